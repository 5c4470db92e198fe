"""What a run does about a step that went wrong: compute it again, skip it, go back to the last good checkpoint."""

from __future__ import annotations

from trainer.checkpoint.load import newest_verified
from trainer.guard.verdict import Verdict
from trainer.restore import restore_tensors
from trainer.run import Run
from trainer.saving import checkpoint, settle


def record_recomputation(run: Run, first: Verdict, second: Verdict) -> None:
    """A step whose loss or gradient was not finite was computed once more from the same batch: say what came out."""
    again = "finite: the fault was transient" if second.finite else "not finite again"
    run.progress.say(
        f"step {run.step + 1} was computed again: loss {first.loss}, gradient norm {first.gradient_norm}; {again}"
    )
    facts = {"loss": str(first.loss), "gradient_norm": str(first.gradient_norm), "finite": second.finite}
    run.event("recomputed", step=run.step + 1, position=run.position, **facts)


def skip(run: Run, count: int, reason: str) -> None:
    """No rank applies the update; the window of data is passed over and recorded."""
    run.skips += 1
    run.applied = 0
    run.skipped.append([run.position, count])
    run.progress.say(f"step {run.step + 1} is skipped: {reason}")
    facts = {"position": run.position, "count": count, "reason": reason}
    run.event("skipped", step=run.step + 1, **facts)


def applied(run: Run, verdict: Verdict) -> None:
    """A step was applied: the streak is over, and after half a window of them the run counts as sound again."""
    run.detector.accept(verdict.loss, verdict.gradient_norm)
    run.skips = 0
    run.applied += 1
    if run.applied >= run.config.guard.spike_window // 2:
        run.rollbacks = 0


def roll_back(run: Run) -> bool:
    """Take the weights and the state of the last good checkpoint, and go on at the present step and position: the data
    since is skipped, as if every step from there had been. Saved at once.

    Returns:
        False if the run went back as often as it may, or there is no good checkpoint.
    """
    if run.rollbacks >= run.config.guard.max_rollbacks:
        return False
    settle(run)
    found = newest_verified(run.checkpoints, good=True)
    if found is None:
        return False
    folder, manifest = found
    restore_tensors(run, folder, manifest)
    run.detector.load(manifest.state["detector"])
    run.skipped = [*manifest.state["skipped"], [manifest.position, run.position - manifest.position]]
    run.skips, run.applied, run.rollbacks = 0, 0, run.rollbacks + 1
    run.progress.say(
        f"step {run.step}: back to the weights of {folder.name}; the {run.position - manifest.position} sequences since are left out"
    )
    facts = {"to": folder.name, "position": run.position, "left_out": run.skipped[-1]}
    run.event("rolled back", step=run.step, **facts)
    checkpoint(run)
    return True
