"""The verb branch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from launch import ledger, process
from launch.verbs.options import RunName, Runs
from trainer import runfolder
from trainer.checkpoint import manifest as manifests
from trainer.files import copy_folder


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Make a new run that starts from a checkpoint of another, e.g. for a cooldown.

    The new run has the source's configuration with your overrides (`--section.key=value`, of what a resume may change),
    the verified checkpoint as its first state, and an empty history. The source is only read. Nothing is trained yet:
    `orthogon resume NEW` does that.
    """

    OVERRIDES: ClassVar[bool] = True
    run: RunName
    name: Annotated[str, arg(metavar="NEW")]
    """The new run's name."""
    from_step: int | None = None
    """The step of the checkpoint; none takes the newest."""
    cooldown: Annotated[str | None, arg(metavar="LENGTH")] = None
    """Let the learning rate fall from the checkpoint on, e.g. "100 steps" or "1B tokens", and end there: sets train.length
    and schedule.decay, and the schedule to wsd if it is neither that nor 1-sqrt."""
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.branching import check_length, cooldown, show_rate
        from trainer import config as configuration

        source, old = process.opened(self.run, self.runs)
        checkpoint, manifest = manifests.pick(source, self.from_step)
        if self.cooldown is not None:
            overrides = [*overrides, *cooldown(self.cooldown, manifest, old, overrides)]
        _, new = process.opened(self.run, self.runs, [*overrides, f"--name={self.name}", f"--runs={self.runs}"])
        steps = check_length(manifest, new)
        how: list[str] = []

        def fill(partial: Path) -> None:
            how.append(manifests.copy(checkpoint, manifest, partial / "checkpoints"))
            copy_folder(source / "tokenizer", partial / "tokenizer")

        folder = runfolder.create(new, runfolder.command_line(), manifests.lineage(source, manifest), fill)
        ledger.remember(folder)
        print(f"run {new.name} starts from {checkpoint.name} of {source.name} ({how[0]}) and trains to step {steps}")
        for key, (before, after) in configuration.changes(
            configuration.resolved(old), configuration.resolved(new)
        ).items():
            if key not in ("name", "runs"):
                print(f"changed: {key} from {before!r} to {after!r}")
        for config in (old, new):
            show_rate(config, manifest)
        print(f"go on with: orthogon resume {process.reference(new.name, self.runs)}")
        return 0
