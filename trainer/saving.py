"""Checkpoints of a run in progress: taken at a step border, survived when they fail, and kept where they are good."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from trainer import config as configuration
from trainer import distributed
from trainer.checkpoint.retention import prune
from trainer.checkpoint.save import all_finite, save
from trainer.outcome import Outcome, RunError
from trainer.run import Run


def checkpoint(run: Run, *, wait: bool = True) -> RunError | None:
    """Save a new generation, unless this step has one, and drop old ones; collective over all ranks.

    Args:
        wait: False lets `checkpoint.asynchronous` write behind the run's back; `settle` tells how that went.

    Returns:
        Why nothing was saved, the same on all ranks, or None. The older generations are as they were.
    """
    error = settle(run)
    if run.saved_step == run.step:
        return error
    run.heart.beat("save")
    began = time.monotonic()
    run.saved_at = began  # also of a failed save: the next one comes at the next interval
    rejected = float(run.optimizer.take_rejected())
    sick = float(not all_finite(run.tensors()))
    rejected, sick = distributed.sum_over_ranks([rejected, sick], run.device)
    run.report_rejected(int(rejected))
    if sick:
        text = f"the weights or the optimizer state of {int(sick)} ranks are not finite"
        return warn(run, RunError(f"step {run.step} is not saved: {text}", outcome=Outcome.DIVERGED))
    lineage = {**run.lineage(), "run": run.config.name}

    def write() -> Path:
        return save(
            run.checkpoints, run.step, run.position, run.tensors(),
            config=configuration.resolved(run.config), state=run.state(), lineage=lineage, attempt=run.attempt,
        )  # fmt: skip

    return _taken(run, write, run.step, run.position, began)


def settle(run: Run) -> RunError | None:
    """Wait for a save that goes on behind the run's back, if there is one, and tell how it ended."""
    return None


def warn(run: Run, error: RunError) -> RunError:
    """Say loudly that a save failed; the run goes on."""
    run.progress.say(f"NOT SAVED: {error}\nolder checkpoints are untouched; the run goes on")
    run.event("save failed", step=run.step, message=error.what, where=error.where)
    return error


def _taken(run: Run, write: Callable[[], Path], step: int, position: int, began: float) -> RunError | None:
    try:
        folder = write()
    except RunError as error:
        return warn(run, error)
    run.saved_step, run.save_seconds = step, time.monotonic() - began
    if distributed.rank() == 0:
        prune(run.checkpoints, run.config.checkpoint.keep)
    facts = {"position": position, "checkpoint": folder.name, "seconds": round(run.save_seconds, 3)}
    run.event("saved", step=step, **facts)
    run.progress.say(f"step {step}: saved {folder.name} in {run.save_seconds:.1f} s")
    return None
