"""Model, strategy and optimizer of a run: made from the configuration, fitted into memory, started from weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from trainer import distributed, runfolder
from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.derive import Derived, derive
from trainer.files import read_json, write_json
from trainer.metrics.progress import Progress
from trainer.model import pretrained
from trainer.model.build import architecture, build
from trainer.model.flops import flops_per_token
from trainer.model.init import allocate
from trainer.model.microbatch import largest_that_fits, micro_steps, rehearse
from trainer.model.prepare import prepare
from trainer.optim import build_optimizer


@dataclass
class Made:
    """A model spread by its strategy, with storage but without values, and its optimizer."""

    model: Any
    strategy: Any
    optimizer: Any
    flops_per_token: int | None


def starting_point(config: RunConfig, folder: Path) -> tuple[pretrained.Source | None, dict[str, Any] | None]:
    """The weights that a run without a checkpoint of its own starts from, and the architecture that came with them."""

    def look() -> tuple[pretrained.Source | None, dict[str, Any] | None]:
        if config.model.init_from is None:
            return None, None
        for generation in manifests.generations(folder / "checkpoints"):
            with suppress(manifests.Damaged):
                return None, manifests.read(generation).state["architecture"]
        source = pretrained.find(config.model.init_from)
        pretrained.check_vocabulary(source, folder / "tokenizer")
        return source, source.architecture()

    return distributed.on_rank_zero(look)


def shape_of(config: RunConfig, facts: dict[str, Any], below: dict[str, Any] | None) -> Any:
    """The `transformers` configuration of the run's model."""
    return architecture(
        config.model,
        vocab_size=facts["vocab_size"],
        bos=facts["bos"],
        eos=facts["eos"],
        max_length=config.data.sequence_length,
        below=below,
    )


def make(config: RunConfig, shape: Any, device: torch.device, world: int) -> Made:
    """Build the model, prepare its blocks, spread it, give it storage, and make its optimizer."""
    strategy = import_module(f"trainer.parallel.{config.parallel.name}")
    model: Any = build(shape)
    flops = flops_per_token(model, config.data.sequence_length)
    blocks = prepare(model, config.train, device)
    model = strategy.shard(model, blocks, config.parallel, config.train.precision, device, world)
    model.train()
    allocate(model, device)
    return Made(model, strategy, build_optimizer(model, config.optim), flops)


def fitting(
    config: RunConfig, shape: Any, derived: Derived, table: Any, device: torch.device, folder: Path, progress: Progress
) -> tuple[Made, Derived]:
    """The model, and the portions of a step: those of the configuration, or under `auto` the largest that fit."""
    world, made = distributed.world(), None

    def attempt(rows: int) -> list[int]:
        nonlocal made
        made = None  # the one that ran out of memory must be gone before the next is made
        made = distributed.together(lambda: make(config, shape, device, world))
        with torch.no_grad():
            for tensor in (*made.model.parameters(), *made.model.buffers()):
                tensor.zero_()
        count = min(2, derive(config, world, table.train.sequences, rows).micro_steps)
        current = made
        out = rehearse(made.model, lambda: micro_steps(current.model, current.strategy, config, rows, device, count))
        made = None if out else made
        return out

    def say(text: str) -> None:
        progress.say(text)
        if distributed.rank() == 0:
            runfolder.record_event(folder, "micro batch", message=text)

    if config.train.micro_batch_size != "auto":
        return distributed.together(lambda: make(config, shape, device, world)), derived
    rows = largest_that_fits(derived.rows, attempt, say)
    assert made is not None
    return made, derive(config, world, table.train.sequences, rows)


def start_from(model: Any, source: pretrained.Source, folder: Path, progress: Progress) -> None:
    """Load the weights that the run starts from, and record where they came from."""
    count = pretrained.load_weights(model, source)
    progress.say(f"started from {source.folder}: {count} tensors")
    if distributed.rank() == 0:
        lineage = source.lineage()
        runfolder.record_event(folder, "initialized", **lineage)
        record = read_json(folder / "run.json")
        write_json(folder / "run.json", {**record, "lineage": {**record["lineage"], **lineage}})
