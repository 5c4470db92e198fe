"""The whole configuration tree of a run. Imports no torch: a login node checks it in a blink.

One YAML file describes one run. Order of precedence: defaults < `base:` file < file < `--dotted.key=value`.
File and command line go through the same validation, so both know human sizes and suggest the nearest key.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import pydantic
from pydantic import Discriminator, Field, TypeAdapter

from trainer import registry
from trainer.config_data import DataConfig as DataConfig
from trainer.config_data import SourceConfig as SourceConfig
from trainer.config_data import TokenizerConfig as TokenizerConfig
from trainer.config_data import check_data
from trainer.ensemble import options as distillation
from trainer.ensemble.options import DistillConfig as DistillConfig
from trainer.guard.options import GuardConfig as GuardConfig
from trainer.metrics.options import MetricsConfig
from trainer.model import library
from trainer.optim import decay
from trainer.outcome import RunError
from trainer.registry import STRICT
from trainer.units import Count, Interval, Length, Seconds, split_interval
from trainer.yaml_source import Source, nearest

if TYPE_CHECKING:
    OptimOptions = Any
    ParallelOptions = Any
else:

    def _union(package: str) -> Any:
        options = tuple(module.Options for module in registry.alternatives(package).values())
        return Annotated[Union[options], Discriminator("name")]

    OptimOptions = _union("trainer.optim")
    ParallelOptions = _union("trainer.parallel")

Positive = Annotated[Count, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    __pydantic_config__ = STRICT
    config: dict[str, Any] = field(default_factory=dict)
    """A `transformers` configuration: `model_type` and its own keys. The vocabulary comes from the tokenizer. With
    `init_from` it may be left out, or change single keys."""
    init_from: str | None = None
    """Weights to start from: a folder in the Hugging Face format, a run's folder, or one of its checkpoints. The run's
    tokenizer must be that of the weights."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor of each group's own rate."""

    __pydantic_config__ = STRICT
    name: Literal["constant", "cosine", "linear", "wsd", "1-sqrt"] = "wsd"
    """`wsd` holds the rate and then falls linearly; `1-sqrt` is wsd with a 1 - sqrt fall; the others fall after warm-up."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of the steps in which the rate rises linearly."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps in which `wsd` and `1-sqrt` fall."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor at the end of the fall."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what portions, and with what care."""

    __pydantic_config__ = STRICT
    length: Length
    """How long to train: `600 steps`, `1B tokens` or `3 epochs`."""
    tokens_per_step: Positive
    """Tokens of one optimizer step over all ranks; accumulation follows from it."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = 8
    """Most sequences that a rank takes through the model at once. `auto` tries a rank's whole share of a step before
    training, and half as many wherever a rank runs out of memory; the update stays the same."""
    loss_chunk: Annotated[Count, Field(gt=0)] | None = None
    """Tokens whose logits exist at a time: saves memory where the vocabulary is large. None makes all logits at once."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What a block keeps for its backward: everything, only its input, or the results of matrix products and attention;
    the rest is computed again."""
    compile: bool = False
    """Compile each block by torch.compile; on the CPU this needs a C++ compiler."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; none does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model's arithmetic; weights and optimizer state stay fp32."""
    time_limit: Seconds | None = None
    """Wall time after which the run saves and ends as preempted, e.g. `11h30m`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    __pydantic_config__ = STRICT
    every: Interval = "30 min"
    """Interval between saves: `500 steps` or `30 min`. The end of a run always saves."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Newest good checkpoints that are kept; one that was saved in a streak of skipped steps is not good."""
    asynchronous: bool = False
    """Write in the background while training goes on, from a copy of all tensors in CPU memory."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When to measure the validation loss, on how much, and which samples to write."""

    __pydantic_config__ = STRICT
    every: Interval = "500 steps"
    """Interval between validations, in steps; the end of a run always validates."""
    sequences: Positive | None = None
    """First so many validation sequences of each source; none takes all."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues at every validation, into `samples.jsonl`; the run is bit-equal with and without."""
    tokens: Positive = 64
    """Most tokens that a prompt is continued by."""


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What a run asks of the machine; free to change at every resume."""

    __pydantic_config__ = STRICT
    ranks: Annotated[int, Field(gt=0)] | None = None
    """Processes on this machine; none takes one per GPU, or one without a GPU."""
    threads_per_rank: Annotated[int, Field(gt=0)] = 1
    """CPU threads of each rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; `auto` takes CUDA where there is one."""


@dataclass(frozen=True, kw_only=True)
class FinishConfig:
    """What `orthogon run` does with a run that finished."""

    __pydantic_config__ = STRICT
    export: bool = True
    """Export to the Hugging Face format, checked by comparing logits."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that the exported model continues."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    __pydantic_config__ = STRICT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """The run's name, and the name of its folder."""
    runs: str = "runs"
    """The folder of the run folders."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    model: ModelConfig
    """The architecture."""
    data: DataConfig
    """Text and tokens."""
    train: TrainConfig
    """Length and portions."""
    optim: OptimOptions
    """The optimizer, chosen by `name`."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    parallel: ParallelOptions
    """How the model is spread over the ranks, chosen by `name`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    guard: GuardConfig = GuardConfig()
    """Steps that go wrong, and patience."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Validation."""
    metrics: MetricsConfig = MetricsConfig()
    """What is recorded, and where it is shown."""
    distill: DistillConfig | None = None
    """A teacher to learn from; none trains on text alone."""
    resources: ResourcesConfig = ResourcesConfig()
    """Ranks, threads, device."""
    finish: FinishConfig = FinishConfig()
    """What follows a finished run."""

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


# Keys that may change between a save and the resume from it; every other key is part of what the run is.
CHANGEABLE = (
    "name", "runs", "data.folder", "data.max_epochs", "train.length", "train.micro_batch_size", "train.loss_chunk",
    "train.activation_checkpointing", "train.compile", "train.clip_norm", "train.time_limit",
    "schedule", "guard", "parallel", "checkpoint", "evaluate", "metrics", "resources", "finish",
    "distill.cache",
    "optim.lr", "optim.weight_decay", "optim.tau_epochs", "optim.adamw.lr", "optim.adamw.weight_decay", "optim.adamw.tau_epochs",
)  # fmt: skip

_adapter: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def load(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, merge and check a configuration; the first mistake is a `RunError` with file, line, key and nearest name."""
    source = Source.read(path)
    source.override(overrides or [])
    return _validate(source)


def parse(raw: dict[str, Any]) -> RunConfig:
    """A configuration from its resolved form, as `resolved` gives it."""
    return _validate(Source(raw=raw, file="the given configuration"))


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration with every default filled in, as JSON values."""
    raw: dict[str, Any] = _adapter.dump_python(config, mode="json")
    return raw


def json_schema() -> dict[str, Any]:
    """JSON schema for editors; kept in `configs/schema.json`."""
    return _adapter.json_schema()


def flatten(raw: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from dotted key to value."""
    if not isinstance(raw, dict):
        return {prefix: raw}
    return {k: v for key, value in raw.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two resolved configurations, with both values."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def check_resume(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The changes from `old` to `new`, all of a kind that a resume allows; the first other one is a `RunError`."""
    found = changes(old, new)
    for key, (before, after) in found.items():
        if not any(key == free or key.startswith(free + ".") for free in CHANGEABLE):
            raise RunError(
                f"{key} was {before!r} when the checkpoint was saved and is {after!r} now",
                where=key,
                mend=f"set {key} back, or start a new run; a resume may change: {', '.join(CHANGEABLE)}",
            )
    return found


def _validate(source: Source) -> RunConfig:
    try:
        config = _adapter.validate_json(json.dumps(source.raw))
    except pydantic.ValidationError as error:
        # An unknown key first: the missing one beside it is most often the same key, misspelt.
        first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise _explain(first, source) from None
    _check(config, source)
    return config


def _explain(error: Any, source: Source) -> RunError:
    """One validation error as a sentence. pydantic puts the union's tag into the path: what is no key is left out."""
    path, node, tag = [], source.raw, None
    for element in error["loc"][:-1]:
        if element == tag:  # optim.adamw in a section whose name is adamw is no key
            tag = None
        elif (isinstance(node, dict) and element in node) or (isinstance(node, list) and isinstance(element, int)):
            node = node[element]
            path.append(str(element))
            tag = node.get("name") if isinstance(node, dict) else None
    last = str(error["loc"][-1])
    here = ".".join([*path, last])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        known = _known_keys(path, source.raw)
        guess = nearest(last, known)
        mend = f"did you mean {guess}?" if guess else f"known keys: {', '.join(sorted(known))}"
        return RunError(f"unknown key {here}", where=source.where(here), mend=mend)
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return RunError(f"{here} is missing", where=source.where(".".join(path)), mend=f"add {here}")
    if kind == "union_tag_invalid":
        names = [name.strip(" '") for name in context["expected_tags"].split(",")]
        guess = nearest(str(context["tag"]), names)
        mend = f"did you mean {guess}?" if guess else f"one of: {', '.join(names)}"
        return RunError(f"{here}.name: there is no '{context['tag']}'", where=source.where(f"{here}.name"), mend=mend)
    if kind == "union_tag_not_found":
        return RunError(f"{here}.name is missing", where=source.where(here), mend=f"add {here}.name")
    message = error["msg"].removeprefix("Value error, ")
    value = "" if isinstance(error["input"], dict) else f" (it is {error['input']!r})"
    return RunError(
        f"{here}: {message[0].lower() + message[1:]}{value}", where=source.where(here), mend=f"correct {here}"
    )


def _known_keys(path: list[str], raw: Any) -> list[str]:
    """The keys that the section at `path` knows, found in the schema."""
    schema = json_schema()
    node: Any = schema
    for element in path:
        if isinstance(raw, list):
            raw, inner = raw[int(element)], node["items"]
        else:
            raw, named = raw[element], node.get("properties") or {}
            inner = named[element] if element in named else next(iter(node["patternProperties"].values()))
        node = _follow(inner, schema, raw)
    return list(node.get("properties", ()))


def _follow(node: Any, schema: Any, raw: Any) -> Any:
    node = next((one for one in node.get("anyOf", ()) if "$ref" in one), node)  # a section that may be left out
    if "discriminator" in node:
        node = {"$ref": node["discriminator"]["mapping"][raw["name"]]}
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _check(config: RunConfig, source: Source) -> None:
    """What no single field can know."""
    train, data = config.train, config.data
    check_data(data, train.length, source)
    rest = train.tokens_per_step % data.sequence_length
    if rest:
        below = train.tokens_per_step - rest
        raise RunError(
            f"train.tokens_per_step = {train.tokens_per_step} is no multiple of data.sequence_length = {data.sequence_length}",
            where=source.where("train.tokens_per_step"),
            mend=f"use {below or ''}{' or ' if below else ''}{below + data.sequence_length}",
        )
    try:
        registry.alternatives("trainer.parallel")[config.parallel.name].check(
            config.parallel, config.optim, config.train
        )
        library.check(config.model.config)
        decay.check(config.optim)
        distillation.check(config.distill, config.parallel, config.train)
    except RunError as error:
        raise RunError(error.what, where=source.where(error.where), mend=error.mend) from None
    _check_model(config, source)
    for key, interval in (
        ("evaluate.every", config.evaluate.every),
        ("metrics.groups_every", config.metrics.groups_every),
    ):
        if interval is not None and split_interval(interval)[1] != "steps":
            raise RunError(
                f"{key} is '{interval}'",
                where=source.where(key),
                mend="give it in steps: what goes by the clock would not repeat bit for bit",
            )
    for key, value in flatten(resolved(config)).items():
        if re.search(r"://[^/\s@]*:[^/\s@]*@", str(value)):
            raise RunError(
                f"{key} holds credentials, which would be kept in the run folder",
                where=source.where(key),
                mend="leave them out and give them through the environment (docs/metrics.md)",
            )


def _check_model(config: RunConfig, source: Source) -> None:
    model, data = config.model, config.data
    if model.init_from is None and "model_type" not in model.config:
        raise RunError(
            "model.config.model_type is missing", where=source.where("model.config"), mend="add it, e.g. llama"
        )
    if model.init_from is not None and data.table is None and data.tokenizer.path is None:
        raise RunError(
            "model.init_from needs the tokenizer of its weights, and this run would train a new one",
            where=source.where("model.init_from"),
            mend="give data.tokenizer.path: the folder of the weights, or tokenizer/ of the run that made them",
        )
