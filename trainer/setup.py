"""Everything a run needs before its first step: table, model, optimizer, restored state."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainer import config as configuration
from trainer import data, distributed, runfolder
from trainer.assembly import fitting, open_strategy, shape_of, starting_point
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load, newest_verified
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches
from trainer.data.masking import Borders
from trainer.derive import Derived, derive
from trainer.evaluate.samples import Samples
from trainer.files import read_json, write_json
from trainer.guard.signals import Flag
from trainer.metrics import follow, history
from trainer.metrics.groups import GroupMetrics
from trainer.metrics.history import History
from trainer.metrics.progress import Progress
from trainer.metrics.trace import Trace
from trainer.model import pretrained
from trainer.model.build import as_json, parameter_count
from trainer.model.check import check_model
from trainer.model.documents import check_documents_apart
from trainer.model.flops import peak_flops
from trainer.model.init import initialize
from trainer.outcome import RunError
from trainer.units import split_interval


@dataclass
class Run:
    """A run in progress on one rank. `step` and `position` are where it is; the rest stays as it is set up."""

    config: RunConfig
    folder: Path
    attempt: int
    flag: Flag
    device: torch.device
    data: Data
    derived: Derived
    model: Any
    strategy: Any
    optimizer: Any
    parameters: list[Any]
    names: dict[Any, str]
    batches: Batches
    validation: dict[str, Batches]
    samples: Samples
    history: History
    groups: GroupMetrics
    trace: Trace
    progress: Progress
    architecture: dict[str, Any]
    flops_per_token: int | None
    peak_flops: float | None
    started: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    step: int = 0
    position: int = 0
    bad_steps: int = 0
    skipped: list[list[int]] = field(default_factory=list)
    data_seconds: float = 0.0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tensors(self) -> dict[str, Any]:
        """All tensors of a checkpoint, as the strategy gives and takes them."""
        found: dict[str, Any] = self.strategy.tensors(self.model, self.optimizer, self.names)
        return found

    def lineage(self) -> dict[str, Any]:
        """Where the run came from, as `run.json` records it."""
        lineage: dict[str, Any] = read_json(self.folder / "run.json").get("lineage", {})
        return lineage

    def state(self) -> dict[str, Any]:
        """All of a checkpoint that is no tensor."""
        return {
            "optimizer": self.optimizer.hyperparameters(),
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
            "architecture": self.architecture,
            "data": self.data.identity(),
        }


def set_up(folder: Path, config: RunConfig, attempt: int, flag: Flag) -> Run:
    """Build everything, restore the newest verified checkpoint if there is one, and print what follows from the config."""
    device = distributed.start(config.resources)
    rank, world = distributed.rank(), distributed.world()
    distributed.same(configuration.flatten(configuration.resolved(config)), "the configuration")
    strategy = distributed.together(lambda: open_strategy(config, device, world))
    progress = Progress(rank == 0, 0)
    distributed.together(lambda: follow.check(config))
    trace_folder = folder / "profile" / str(attempt)
    trace = distributed.together(lambda: Trace(config.metrics, trace_folder, rank, device, progress.say))
    opened = open_data(config, folder, progress)
    borders = Borders(opened.tokenizer["bos"], opened.tokenizer["eos"]) if config.data.document_masking else None
    derived = distributed.together(lambda: derive(config, world, opened.train))
    source, below = starting_point(config, folder)
    shape = distributed.together(lambda: shape_of(config, opened.tokenizer, below))
    made, derived = fitting(config, shape, derived, opened.train, strategy, folder, progress)
    model = made.model
    initialize(model, config.seed, strategy.initial_device, weights=source is None)
    loaded = pretrained.load_weights(model, source) if source is not None else 0
    if made.optimizer is None:
        made.optimizer = distributed.together(lambda: strategy.optimizer(model, config.optim))
        strategy.connect(model, made.optimizer)
    rows = config.train.micro_batch_size
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        flag=flag,
        device=device,
        data=opened,
        derived=derived,
        model=model,
        strategy=strategy,
        optimizer=made.optimizer,
        parameters=list(model.parameters()),
        names={parameter: name for name, parameter in model.named_parameters()},
        batches=Batches(opened.train, rank, world, derived.rows, derived.micro_steps, borders),
        validation={
            name: Batches(split, rank, world, derived.rows if rows == "auto" else rows, 1, borders)
            for name, split in opened.validation.items()
        },
        samples=Samples(folder, config.evaluate.prompts, config.evaluate.tokens, config.seed),
        history=History(None),
        groups=group_metrics(
            config,
            made.optimizer,
            strategy,
            sum(s.sequences for s in opened.train.sources) / derived.sequences_per_step,
        ),
        trace=trace,
        progress=progress,
        architecture=as_json(shape),
        flops_per_token=made.flops_per_token,
        peak_flops=peak_flops(device, config.train.precision),
    )
    progress.steps = derived.steps
    if source is not None:
        record_start(run, source, loaded)
    restore(run)
    distributed.together(lambda: check_model(model, strategy, config.train.precision, device))
    if borders is not None:
        check_masking(run)
    if rank == 0:
        run.history = open_history(run)
        record_data(folder, opened)
    describe(run)
    return run


def group_metrics(config: RunConfig, optimizer: Any, strategy: Any, steps_per_epoch: float) -> GroupMetrics:
    """What is measured of each parameter group, at the configured interval."""
    interval = config.metrics.groups_every
    every = int(split_interval(interval)[0]) if interval else None
    return GroupMetrics(optimizer, every, steps_per_epoch, strategy.parts)


def open_history(run: Run) -> History:
    """The history, followed by the configured sinks. Rank 0 only."""

    def tell(text: str) -> None:
        run.progress.say(text)
        runfolder.record_event(run.folder, "sink", message=text)

    path = run.folder / "metrics.jsonl"
    return History(path, follow.follow(run.config, run.folder, run.step, history.read(path), tell))


def open_data(config: RunConfig, folder: Path, progress: Progress) -> Data:
    """The token tables, prepared by rank 0 if they have to be, verified, their tokenizer copied into the run folder."""

    def prepared() -> dict[str, Path]:
        paths = data.prepare(config.data, progress.say)
        for path in paths.values():
            data.verify(path)
        if not (folder / "tokenizer").exists():
            shutil.copytree(next(iter(paths.values())) / "tokenizer", folder / "tokenizer")
        return paths

    paths = distributed.on_rank_zero(prepared, patience=timedelta(days=7))  # a large corpus takes its time
    return distributed.together(lambda: data.open_data(paths, config.data))


def record_data(folder: Path, opened: Data) -> None:
    """Which tables the run reads, from which text, and what makes them these."""
    known = ("python", "corpus_digest", "path", "unigram_bits_per_byte")
    tables = {
        name: {"table": str(table.folder)} | {key: table.facts[key] for key in known}
        for name, table in opened.tables.items()
    }
    unigram = opened.unigram_bits_per_byte
    runfolder.record_event(folder, "data", tables=tables, unigram_bits_per_byte=unigram, **opened.identity())


def check_masking(run: Run) -> None:
    """Refuse a model that lets documents see each other, on all ranks alike."""
    vocabulary, length = run.data.tokenizer["vocab_size"], run.config.data.sequence_length
    context = run.strategy.context()
    distributed.together(lambda: check_documents_apart(run.strategy.forward, vocabulary, length, context, run.device))
    run.strategy.settle(run.model)


def record_start(run: Run, source: pretrained.Source, count: int) -> None:
    """Record where the weights came from that the run starts from."""
    run.progress.say(f"started from {source.folder}: {count} tensors")
    if distributed.rank() == 0:
        lineage = source.lineage()
        runfolder.record_event(run.folder, "initialized", **lineage)
        record = read_json(run.folder / "run.json")
        write_json(run.folder / "run.json", {**record, "lineage": {**record["lineage"], **lineage}})


def restore(run: Run) -> None:
    """Load the newest checkpoint that verifies; without one, start at step 0 with an empty history."""
    found = newest_verified(run.checkpoints)
    new = configuration.resolved(run.config)
    if found is not None:
        folder, manifest = found

        def same_run() -> dict[str, Any]:
            changed = configuration.check_resume(manifest.config, new)
            check_data(manifest, run.data.identity())
            return changed

        changed = distributed.together(same_run)
        tensors = run.tensors()
        entries = load(folder, manifest, tensors)
        run.strategy.adopt(tensors, run.model, run.optimizer, run.names)
        run.step, run.position, run.saved_step = manifest.step, manifest.position, manifest.step
        run.bad_steps, run.skipped = manifest.state["bad_steps"], manifest.state["skipped"]
        run.progress.say(f"resumed from {folder.name}: {entries} tensors restored, position {run.position}")
        if distributed.rank() == 0:
            kept = {key: list(values) for key, values in changed.items()}
            runfolder.record_event(run.folder, "resumed", attempt=run.attempt, step=run.step, changed=kept)
            for key, (before, after) in changed.items():
                run.progress.say(f"changed since the save: {key} from {before!r} to {after!r}")
    if distributed.rank() == 0:
        for file in (run.folder / "metrics.jsonl", run.samples.path):
            history.cut(file, run.step)


def check_data(manifest: manifests.Manifest, identity: dict[str, Any]) -> None:
    """Refuse to go on with other data than the checkpoint's."""
    saved = manifest.state["data"]
    facts = [("another tokenizer", saved["tokenizer"], identity["tokenizer"])]
    for name, source in identity["sources"].items():
        what = "other training tokens" if len(identity["sources"]) == 1 else f"other training tokens of {name}"
        facts.append((what, saved["sources"][name]["train_sha256"], source["train_sha256"]))
    for what, before, now in facts:
        if before != now:
            raise RunError(
                f"the prepared data has {what} than the checkpoint of step {manifest.step} was trained on",
                where=f"data ({before[:12]} was saved, {now[:12]} is here)",
                mend="give the table of that run as data.table, or start a new run",
            )


def describe(run: Run) -> None:
    """Print the derived values."""
    config, derived, tokenizer = run.config, run.derived, run.data.tokenizer
    world = distributed.world()
    passes = run.data.train.epochs(derived.available)
    epochs = ", ".join(f"{count:.2f} epochs" + (f" of {n}" if len(passes) > 1 else "") for n, count in passes.items())
    tokens = derived.sequences * config.data.sequence_length
    groups = ", ".join(f"{g['label']} {g['rule']} lr {g['initial_lr']:g}" for g in run.optimizer.hyperparameters())
    run.progress.table(
        f"run {config.name}",
        [
            ("model", f"{run.architecture['model_type']}, {parameter_count(run.model):,} parameters"),
            ("compute", compute_of(run)),
            *data.summary(run.data),
            ("tokenizer", f"{tokenizer['vocab_size']:,} tokens, digest {tokenizer['tokenizer_digest'][:12]}"),
            ("ranks", f"{world} x {run.device.type}, {config.train.precision}"),
            ("mesh", f"{config.parallel.name}, {run.strategy.mesh()}"),
            ("step", f"{derived.sequences_per_step} sequences = {world} ranks x {derived.micro_steps} micro-steps x "
                     f"{derived.rows} rows"),
            ("length", f"{derived.steps:,} steps, {tokens:,} tokens, {epochs}"),
            ("optimizer", groups),
            ("schedule", f"{config.schedule.name}, warm-up {config.schedule.warmup:.0%}, floor {config.schedule.floor:g}"),
            ("baseline", f"{run.data.unigram_bits_per_byte:.4f} bits per byte (unigram entropy of the validation tokens)"),
        ],
    )  # fmt: skip


def compute_of(run: Run) -> str:
    """Operations per token and the peak that MFU refers to, as words."""
    flops = "unknown" if run.flops_per_token is None else f"{run.flops_per_token:,}"
    if run.peak_flops is None:
        return f"{flops} FLOPs per token; the peak of this device is unknown, and so is MFU"
    return f"{flops} FLOPs per token; MFU of {run.peak_flops / 1e12:g} TFLOP/s per device"
