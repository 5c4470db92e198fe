"""Everything a run needs before its first step: table, model, optimizer, restored state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainer import config as configuration
from trainer import data, distributed, runfolder
from trainer.assembly import fitting, open_strategy, shape_of, starting_point
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches
from trainer.data.masking import Borders
from trainer.derive import derive
from trainer.ensemble.lessons import open_lessons
from trainer.evaluate.samples import Samples
from trainer.files import copy_folder, read_json, write_json
from trainer.guard import faults
from trainer.guard.faults import fault
from trainer.guard.spikes import SpikeDetector
from trainer.guard.watchdog import Watchdog
from trainer.lock import Lock
from trainer.metrics import follow, history
from trainer.metrics.groups import GroupMetrics, entries
from trainer.metrics.history import History
from trainer.metrics.progress import Progress
from trainer.metrics.trace import Trace
from trainer.model import pretrained
from trainer.model.build import as_json, parameter_count
from trainer.model.check import check_model
from trainer.model.documents import check_documents_apart
from trainer.model.flops import peak_flops
from trainer.model.init import initialize
from trainer.optim import decay
from trainer.outcome import Outcome, RunError
from trainer.replay import replay
from trainer.restore import restore
from trainer.run import Run
from trainer.units import split_interval

LOCK_PATIENCE = 30.0
"""Seconds that a run waits for another process to let go of its folder: one that is ending needs some."""


def set_up(folder: Path, config: RunConfig, attempt: int, watch: Watchdog, verify: bool = False) -> Run:
    """Build everything, restore the newest verified checkpoint if there is one, and print what follows from the config.

    Args:
        verify: train the last recorded steps once more before, and refuse to go on if they differ.
    """
    device = distributed.start(config.resources)
    faults.locate(rank=distributed.rank(), attempt=attempt, step=0)
    watch.stop_timeout = config.guard.stop_timeout
    fault("start.begin")
    progress = Progress(distributed.rank() == 0, 0)
    lock = lock_folder(folder, attempt, progress)
    try:
        run = make_run(folder, config, attempt, watch, device, progress)
        run.lock = lock
        if lock is not None:
            watch.every_moment = lock.touch
        if verify:
            replay(run)
        begin_where_it_was(run)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return run


def lock_folder(folder: Path, attempt: int, progress: Progress) -> Lock | None:
    """Make sure that no other process writes into the run's folder; collective, the lock itself is on rank 0.

    Raises:
        RunError: another process does.
    """
    taken: list[Lock] = []

    def take() -> str:
        taken.append(Lock.acquire(folder, attempt, LOCK_PATIENCE))
        return taken[0].left_behind

    left_behind = distributed.on_rank_zero(take)
    if left_behind:
        progress.say(left_behind)
    return taken[0] if taken else None


def make_run(
    folder: Path, config: RunConfig, attempt: int, watch: Watchdog, device: torch.device, progress: Progress
) -> Run:
    """Data, model and optimizer, with the initial weights."""
    rank, world = distributed.rank(), distributed.world()
    distributed.same(configuration.flatten(configuration.resolved(config)), "the configuration")
    strategy = distributed.together(lambda: open_strategy(config, device, world))
    distributed.together(lambda: follow.check(config))
    trace_folder = folder / "profile" / str(attempt)
    trace = distributed.together(lambda: Trace(config.metrics, trace_folder, rank, device, progress.say))
    watch.heart.beat("data preparation")
    opened = open_data(config, folder, progress, watch.told)
    watch.patience = config.guard.first_step_timeout
    watch.heart.beat("model")
    fault("start.model")
    borders = Borders(opened.tokenizer["bos"], opened.tokenizer["eos"]) if config.data.document_masking else None
    derived = distributed.together(lambda: derive(config, world, opened.train))
    steps_per_epoch = sum(s.sequences for s in opened.train.sources) / derived.sequences_per_step
    optim = distributed.together(lambda: decay.settled(config.optim, steps_per_epoch))
    source, below = starting_point(config, folder)
    shape = distributed.together(lambda: shape_of(config, opened.tokenizer, below))
    made, derived = fitting(config, optim, shape, derived, opened.train, strategy, folder, progress)
    model = made.model
    initialize(model, config.seed, strategy.initial_device, weights=source is None)
    loaded = pretrained.load_weights(model, source) if source is not None else 0
    if made.optimizer is None:
        made.optimizer = distributed.together(lambda: strategy.optimizer(model, optim))
        strategy.connect(model, made.optimizer)
    rows = config.train.micro_batch_size
    watch.heart.beat("teacher")
    lessons = open_lessons(config, folder, opened, model, strategy)
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        watch=watch,
        detector=SpikeDetector(config.guard),
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
        groups=group_metrics(config, made.optimizer, strategy, steps_per_epoch),
        trace=trace,
        progress=progress,
        architecture=as_json(shape),
        flops_per_token=made.flops_per_token,
        peak_flops=peak_flops(device, config.train.precision),
        lessons=lessons,
    )
    progress.steps = derived.steps
    if source is not None:
        record_start(run, source, loaded)
    return run


def begin_where_it_was(run: Run) -> None:
    """Restore the run's own checkpoint, if there is one, check the model, and open the history."""
    run.heart.beat("restore")
    restore(run)
    fault("start.restored")
    run.heart.beat("model check", run.step, run.position)
    precision = run.config.train.precision
    distributed.together(lambda: check_model(run.model, run.strategy, precision, run.device))
    if run.config.data.document_masking:
        check_masking(run)
    if distributed.rank() == 0:
        run.history = open_history(run)
        record_data(run.folder, run.data)
    run.event("planned", attempt=run.attempt, steps=run.derived.steps, ranks=distributed.world())
    describe(run)


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


def open_data(config: RunConfig, folder: Path, progress: Progress, told: Callable[[], str] = lambda: "") -> Data:
    """The token tables, prepared by rank 0 if they have to be, verified, their tokenizer copied into the run folder.

    Args:
        told: whether a signal came to any rank; then the preparation ends as preempted, with its finished parts kept.
    """

    def check() -> None:
        signal = told()
        if signal:
            raise RunError(f"{signal} came while data was prepared; finished parts are kept", outcome=Outcome.PREEMPTED)

    def say(text: str) -> None:
        progress.say(text)
        check()

    def prepared() -> dict[str, Path]:
        fault("start.data")
        paths = data.prepare(config.data, say, check)
        for path in paths.values():
            data.verify(path)
        keep_tokenizer(next(iter(paths.values())), folder)
        return paths

    paths = distributed.on_rank_zero(prepared, patience=timedelta(days=7))  # a large corpus takes its time
    return distributed.together(lambda: data.open_data(paths, config.data))


def keep_tokenizer(table: Path, folder: Path) -> None:
    """Copy a table's tokenizer into a run folder that has none, whole or not at all."""
    if not (folder / "tokenizer").exists():
        copy_folder(table / "tokenizer", folder / "tokenizer")


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
            *((f"{name} pool", f"synthetic pool passes: {passes[name]:.2f}") for name in run.data.synthetic),
            ("optimizer", groups),
            ("decay", decay_of(run)),
            *([("teacher", run.lessons.summary)] if run.lessons else []),
            ("schedule", f"{config.schedule.name}, warm-up {config.schedule.warmup:.0%}, floor {config.schedule.floor:g}"),
            ("baseline", f"{run.data.unigram_bits_per_byte:.4f} bits per byte (unigram entropy of the validation tokens)"),
        ],
    )  # fmt: skip
    for name in run.data.synthetic:
        if passes[name] > 1:
            run.progress.say(f"the synthetic pool of {name} is repeated; synthetic pool passes: {passes[name]:.2f}")
            run.event("synthetic pool repeated", source=name, passes=round(passes[name], 4))


def decay_of(run: Run) -> str:
    """Which parameters decay, and how fast, as words."""
    measured = run.groups
    sizes = [(len(members), sum(entries(p) for p in members)) for members in measured.parts.members]
    return decay.summary(run.optimizer.hyperparameters(), measured.names, sizes, measured.steps_per_epoch)


def compute_of(run: Run) -> str:
    """Operations per token and the peak that MFU refers to, as words."""
    flops = "unknown" if run.flops_per_token is None else f"{run.flops_per_token:,}"
    if run.peak_flops is None:
        return f"{flops} FLOPs per token; the peak of this device is unknown, and so is MFU"
    return f"{flops} FLOPs per token; MFU of {run.peak_flops / 1e12:g} TFLOP/s per device"
