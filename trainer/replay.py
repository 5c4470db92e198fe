"""`orthogon resume RUN --verify`: the last recorded steps again, compared bit for bit, before the run goes on."""

from __future__ import annotations

import json
from typing import Any

from trainer import distributed
from trainer.checkpoint.load import newest_verified
from trainer.loop import step
from trainer.metrics import history
from trainer.outcome import Outcome, RunError
from trainer.restore import take_over
from trainer.run import Run


class Comparison:
    """Takes the place of a history, and compares what would be written with what was; holds the first difference."""

    def __init__(self, recorded: dict[int, dict[str, Any]]) -> None:
        self.recorded = recorded
        self.difference: str | None = None

    def write(self, **record: Any) -> None:
        """Compare one record, but for its timings."""
        now = json.loads(json.dumps(history.lasting(record)))
        before = self.recorded.get(now["step"], {})
        for key in [*before, *(key for key in now if key not in before)]:
            if before.get(key) != now.get(key) and self.difference is None:
                self.difference = f"step {now['step']}: {key} was {before.get(key)!r} and is {now.get(key)!r} now"

    def close(self, *, hurry: bool = False) -> None:
        """Nothing to close."""


def replay(run: Run) -> None:
    """Train again from the newest checkpoint before the last recorded step up to that step; nothing is written or saved.

    The run is left somewhere: it must be restored after this. Costs at most the steps between two checkpoints.

    Raises:
        RunError: on all ranks alike: the first record that differs, as a bug; or there is nothing to compare.
    """
    file = run.folder / "metrics.jsonl"
    recorded = distributed.on_rank_zero(
        lambda: {r["step"]: history.lasting(r) for r in history.read(file) if "loss" in r}
    )
    last = max(recorded, default=0)
    found = newest_verified(run.checkpoints, before=last)
    if found is None:
        raise RunError(
            f"there is no checkpoint before step {last}, the last that is recorded: nothing can be verified",
            where=str(run.checkpoints),
            mend="resume without --verify",
        )
    folder, manifest = found
    if manifest.world_size != distributed.world():
        raise RunError(
            f"{folder.name} was saved by {manifest.world_size} ranks; on {distributed.world()} the last bits differ",
            where="resources.ranks",
            mend=f"verify with --resources.ranks={manifest.world_size}, or resume without --verify",
        )
    take_over(run, folder, manifest)
    comparison = Comparison(recorded)
    run.history, kept = comparison, run.history  # type: ignore[assignment]
    run.silent = True
    run.progress.say(f"verifying: steps {run.step + 1} to {last} once more from {folder.name}")
    first, stop = run.step + 1, ""
    while run.step < last and run.skips < run.config.guard.max_skips and not stop:
        stop = step(run).stop
        difference = distributed.on_rank_zero(lambda: comparison.difference)
        if difference is not None:
            raise RunError(
                f"this is not the run that was recorded: {difference}",
                where=f"{file}, trained again from {folder.name}",
                mend="compare code, versions and hardware (`orthogon diff`, run.json); to go on all the same, resume without --verify",
                outcome=Outcome.BUG,
            )
    run.history, run.silent = kept, False
    run.progress.say(f"verified: steps {first} to {run.step} are equal to the record, bit for bit")
