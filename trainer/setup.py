"""Everything a run needs before its first step: table, model, optimizer, restored state."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import config as configuration
from trainer import data, distributed, runfolder
from trainer.assembly import fitting, shape_of, start_from, starting_point
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load, newest_verified
from trainer.config import RunConfig
from trainer.data.batches import Batches
from trainer.derive import Derived, derive
from trainer.files import read_json
from trainer.guard.signals import Flag
from trainer.metrics import history
from trainer.metrics.history import History
from trainer.metrics.progress import Progress
from trainer.model.build import as_json, model_tensors, parameter_count
from trainer.model.check import check_model
from trainer.model.flops import peak_flops
from trainer.model.init import initialize
from trainer.outcome import RunError


@dataclass
class Run:
    """A run in progress on one rank. `step` and `position` are where it is; the rest stays as it is set up."""

    config: RunConfig
    folder: Path
    attempt: int
    flag: Flag
    device: torch.device
    table: Any
    derived: Derived
    model: Any
    strategy: Any
    optimizer: Any
    parameters: list[Any]
    names: dict[Any, str]
    batches: Batches
    validation: Batches
    history: History
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

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tensors(self) -> dict[str, Any]:
        """All tensors of a checkpoint: weights, persistent buffers, optimizer state."""
        return model_tensors(self.model) | {
            f"optim.{key}": value for key, value in self.optimizer.state_tensors(self.names).items()
        }

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
            "data": data_identity(self.table),
        }


def data_identity(table: Any) -> dict[str, Any]:
    """What makes a stream of data the same stream."""
    train = table.facts["splits"]["train"]
    return {
        "train_sha256": train["sha256"],
        "sequences": train["sequences"],
        "tokenizer": table.facts["tokenizer_digest"],
    }


def set_up(folder: Path, config: RunConfig, attempt: int, flag: Flag) -> Run:
    """Build everything, restore the newest verified checkpoint if there is one, and print what follows from the config."""
    device = distributed.start(config.resources)
    rank, world = distributed.rank(), distributed.world()
    progress = Progress(rank == 0, 0)
    table = open_data(config, folder, progress)
    derived = distributed.together(lambda: derive(config, world, table.train.sequences))
    source, below = starting_point(config, folder)
    shape = distributed.together(lambda: shape_of(config, table.facts, below))
    made, derived = fitting(config, shape, derived, table, device, folder, progress)
    model = made.model
    initialize(model, config.seed, device, weights=source is None)
    rows = config.train.micro_batch_size
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        flag=flag,
        device=device,
        table=table,
        derived=derived,
        model=model,
        strategy=made.strategy,
        optimizer=made.optimizer,
        parameters=list(model.parameters()),
        names={parameter: name for name, parameter in model.named_parameters()},
        batches=Batches(table.train, config.data.order_seed, rank, world, derived.rows, derived.micro_steps),
        validation=Batches(table.validation, None, rank, world, derived.rows if rows == "auto" else rows, 1),
        history=History(None),
        progress=progress,
        architecture=as_json(shape),
        flops_per_token=made.flops_per_token,
        peak_flops=peak_flops(device, config.train.precision),
    )
    progress.steps = derived.steps
    if source is not None:
        start_from(model, source, folder, progress)
    restore(run)
    distributed.together(lambda: check_model(model, made.strategy, config.train.precision, device))
    if rank == 0:
        run.history = History(folder / "metrics.jsonl")
        facts = {key: table.facts[key] for key in ("python", "corpus_digest", "unigram_bits_per_byte")}
        runfolder.record_event(folder, "data", table=str(table.folder), **facts, **data_identity(table))
    describe(run)
    return run


def open_data(config: RunConfig, folder: Path, progress: Progress) -> Any:
    """The token table, prepared by rank 0 if it has to be, verified, with its tokenizer copied into the run folder."""

    def prepared() -> Path:
        path = data.prepare(config.data, progress.say)
        data.verify(path)
        if not (folder / "tokenizer").exists():
            shutil.copytree(path / "tokenizer", folder / "tokenizer")
        return path

    path = distributed.on_rank_zero(prepared)
    return distributed.together(lambda: data.open_table(path, config.data))


def restore(run: Run) -> None:
    """Load the newest checkpoint that verifies; without one, start at step 0 with an empty history."""
    found = newest_verified(run.checkpoints)
    new = configuration.resolved(run.config)
    if found is not None:
        folder, manifest = found

        def same_run() -> dict[str, Any]:
            changed = configuration.check_resume(manifest.config, new)
            check_data(manifest, data_identity(run.table))
            return changed

        changed = distributed.together(same_run)
        entries = load(folder, manifest, run.tensors())
        run.step, run.position, run.saved_step = manifest.step, manifest.position, manifest.step
        run.bad_steps, run.skipped = manifest.state["bad_steps"], manifest.state["skipped"]
        run.progress.say(f"resumed from {folder.name}: {entries} tensors restored, position {run.position}")
        if distributed.rank() == 0:
            kept = {key: list(values) for key, values in changed.items()}
            runfolder.record_event(run.folder, "resumed", attempt=run.attempt, step=run.step, changed=kept)
            for key, (before, after) in changed.items():
                run.progress.say(f"changed since the save: {key} from {before!r} to {after!r}")
    if distributed.rank() == 0:
        history.cut(run.folder / "metrics.jsonl", run.step)


def check_data(manifest: manifests.Manifest, identity: dict[str, Any]) -> None:
    """Refuse to go on with other data than the checkpoint's."""
    saved = manifest.state["data"]
    for key, what in (("tokenizer", "another tokenizer"), ("train_sha256", "other training tokens")):
        if saved[key] != identity[key]:
            raise RunError(
                f"the prepared data has {what} than the checkpoint of step {manifest.step} was trained on",
                where=f"data ({saved[key][:12]} was saved, {identity[key][:12]} is here)",
                mend="give the table of that run as data.table, or start a new run",
            )


def describe(run: Run) -> None:
    """Print the derived values."""
    config, derived, facts = run.config, run.derived, run.table.facts
    train = facts["splits"]["train"]
    world = distributed.world()
    tokens = derived.sequences * config.data.sequence_length
    groups = ", ".join(f"{g['label']} {g['rule']} lr {g['initial_lr']:g}" for g in run.optimizer.hyperparameters())
    run.progress.table(
        f"run {config.name}",
        [
            ("model", f"{run.architecture['model_type']}, {parameter_count(run.model):,} parameters"),
            ("compute", compute_of(run)),
            ("data", f"{train['sequences']:,} sequences of {config.data.sequence_length} tokens, "
                     f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes per token, digest {train['sha256'][:12]}"),
            ("tokenizer", f"{facts['vocab_size']:,} tokens, digest {facts['tokenizer_digest'][:12]}, "
                          f"Python {facts['python']}"),
            ("ranks", f"{world} x {run.device.type}, {config.parallel.name}, {config.train.precision}"),
            ("step", f"{derived.sequences_per_step} sequences = {world} ranks x {derived.micro_steps} micro-steps x "
                     f"{derived.rows} rows"),
            ("length", f"{derived.steps:,} steps, {tokens:,} tokens, {derived.epochs:.2f} epochs"),
            ("optimizer", groups),
            ("schedule", f"{config.schedule.name}, warm-up {config.schedule.warmup:.0%}, floor {config.schedule.floor:g}"),
            ("baseline", f"{facts['unigram_bits_per_byte']:.4f} bits per byte (unigram entropy of the validation tokens)"),
        ],
    )  # fmt: skip


def compute_of(run: Run) -> str:
    """Operations per token and the peak that MFU refers to, as words."""
    flops = "unknown" if run.flops_per_token is None else f"{run.flops_per_token:,}"
    if run.peak_flops is None:
        return f"{flops} FLOPs per token; the peak of this device is unknown, and so is MFU"
    return f"{flops} FLOPs per token; MFU of {run.peak_flops / 1e12:g} TFLOP/s per device"
