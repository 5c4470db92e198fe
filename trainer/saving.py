"""Checkpoints of a run in progress: taken at a step border, survived when they fail, and kept where they are good."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer import distributed
from trainer.checkpoint.background import Background
from trainer.checkpoint.retention import prune
from trainer.checkpoint.room import check_room
from trainer.checkpoint.save import all_finite, save
from trainer.outcome import Outcome, RunError
from trainer.run import Run


def prepare_saves(run: Run) -> None:
    """Make what saves need, and tell before the first step where the disk is too small; collective over all ranks.

    Raises:
        RunError: not even one checkpoint fits.
    """
    if run.config.checkpoint.asynchronous:
        run.background = Background()
    tensors = run.tensors()
    warning = distributed.on_rank_zero(lambda: check_room(run.checkpoints, tensors, run.config.checkpoint.keep))
    if warning:
        run.progress.say(f"WARNING: {warning}")
        run.event("little room", message=warning)


def checkpoint(run: Run, *, wait: bool = True) -> RunError | None:
    """Save a new generation, unless this step has one, and drop old ones; collective over all ranks.

    Args:
        wait: False lets a save of `checkpoint.asynchronous` go on behind the run's back, until `settle`.

    Returns:
        Why the newest state is not saved, the same on all ranks, or None. The older generations are as they were.
    """
    error = settle(run)
    if run.saved_step == run.step:
        return error
    run.heart.beat("save")
    began = run.saved_at = time.monotonic()  # also of a failed save: the next try comes at the next interval
    tensors = run.tensors()
    facts = [float(run.optimizer.take_rejected()), float(not all_finite(tensors))]
    rejected, sick = distributed.sum_over_ranks(facts, run.device)
    run.report_rejected(int(rejected))
    if sick:
        what = f"step {run.step} is not saved: weights or optimizer state are not finite on {int(sick)} ranks"
        return warn(run, RunError(what, where=str(run.checkpoints), outcome=Outcome.DIVERGED))
    where = (run.checkpoints, run.step, run.position, tensors)
    more: dict[str, Any] = {
        "config": configuration.resolved(run.config), "state": run.state(),
        "lineage": {**run.lineage(), "run": run.config.name}, "attempt": run.attempt,
    }  # fmt: skip
    run.saving = (run.step, run.position, began)
    if run.background is not None:
        run.background.start(*where, **more)
        run.saved_step = run.step
        return settle(run) if wait else None
    try:
        folder = save(*where, **more)
    except RunError as failure:
        return warn(run, failure)
    kept(run, folder)
    return None


def settle(run: Run) -> RunError | None:
    """Wait for the save that goes on behind the run's back, if there is one, and tell how it ended; collective."""
    if run.background is None:
        return None
    try:
        folder = run.background.finish()
    except RunError as failure:
        run.saved_step = -1
        return warn(run, failure)
    if folder is not None:
        kept(run, folder)
    return None


def kept(run: Run, folder: Path) -> None:
    """A generation is complete: say so, and drop what is older than the configuration keeps."""
    step, position, began = run.saving
    run.saved_step, run.save_seconds = step, time.monotonic() - began
    if distributed.rank() == 0:
        problem = prune(run.checkpoints, run.config.checkpoint.keep).problem
        if problem:
            run.progress.say(f"WARNING: {problem}")
    facts = {"position": position, "checkpoint": folder.name, "seconds": round(run.save_seconds, 3)}
    run.event("saved", step=step, **facts)
    run.progress.say(f"step {step}: saved {folder.name} in {run.save_seconds:.1f} s")


def warn(run: Run, error: RunError) -> RunError:
    """Say loudly that a save failed; the run goes on."""
    run.progress.say(f"NOT SAVED: {error}\nolder checkpoints are untouched; the run goes on")
    run.event("save failed", step=run.step, message=error.what, where=error.where)
    return error
