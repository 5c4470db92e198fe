"""The verb branch."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from launch import process
from launch.verbs.options import RunName, Runs
from trainer import config as configuration
from trainer import runfolder
from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.derive import derive
from trainer.outcome import RunError
from trainer.schedule import factor
from trainer.units import split_length


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
        source, old = process.opened(self.run, self.runs)
        checkpoint, manifest = manifests.pick(source, self.from_step)
        if self.cooldown is not None:
            overrides = [*overrides, *cooldown(self.cooldown, manifest, old, overrides)]
        _, new = process.opened(self.run, self.runs, [*overrides, f"--name={self.name}", f"--runs={self.runs}"])
        steps = check_length(manifest, new)
        folder = runfolder.create(new, runfolder.command_line(), manifests.lineage(source, manifest))
        try:
            how = manifests.copy(checkpoint, manifest, folder / "checkpoints")
            shutil.copytree(source / "tokenizer", folder / "tokenizer")
        except BaseException:
            shutil.rmtree(folder)
            raise
        print(f"run {new.name} starts from {checkpoint.name} of {source.name} ({how}) and trains to step {steps}")
        for key, (before, after) in configuration.changes(
            configuration.resolved(old), configuration.resolved(new)
        ).items():
            if key not in ("name", "runs"):
                print(f"changed: {key} from {before!r} to {after!r}")
        for config in (old, new):
            show_rate(config, manifest)
        print(f"go on with: orthogon resume {process.reference(new.name, self.runs)}")
        return 0


def cooldown(length: str, manifest: manifests.Manifest, config: RunConfig, overrides: list[str]) -> list[str]:
    """The overrides that let the rate fall over `length` from the checkpoint on.

    Raises:
        RunError: it is no length, or an override says something else.
    """
    for key in ("train.length", "schedule.decay", "schedule.name"):
        if any(given.startswith(f"--{key}=") for given in overrides):
            raise RunError(f"--cooldown sets {key}", where=f"command line, --{key}", mend="leave one of the two out")
    try:
        number, unit = split_length(length)
    except ValueError as error:
        raise RunError(str(error), where="command line, --cooldown", mend='e.g. --cooldown="100 steps"') from None
    per_step = config.train.tokens_per_step // config.data.sequence_length
    sequences = {"tokens": number / config.data.sequence_length, "epochs": number * manifest.state["data"]["sequences"]}
    steps = max(1, math.ceil(number if unit == "steps" else sequences[unit] / per_step))
    total = manifest.step + steps
    found = [f"--train.length={total} steps", f"--schedule.decay={steps / total!r}"]
    return found if config.schedule.name in ("wsd", "1-sqrt") else [*found, "--schedule.name=wsd"]


def check_length(manifest: manifests.Manifest, config: RunConfig) -> int:
    """The steps of the new run, which must lie beyond the checkpoint.

    Raises:
        RunError: nothing would be left to train.
    """
    derived = derive(config, 1, manifest.state["data"]["sequences"])
    if derived.available <= manifest.position:
        raise RunError(
            f"the checkpoint of step {manifest.step} is at the end: train.length = {config.train.length} leaves nothing to train",
            where="train.length",
            mend=f'give more, e.g. --train.length="{manifest.step + max(1, manifest.step // 10)} steps", '
            "or an earlier step with --from-step",
        )
    return derived.steps


def show_rate(config: RunConfig, manifest: manifests.Manifest) -> None:
    """The factor of the learning rate at the next step, under one run's schedule."""
    steps = derive(config, 1, manifest.state["data"]["sequences"]).steps
    if manifest.step < steps:
        rate = factor(config.schedule, manifest.step, steps)
        print(f"learning rate at step {manifest.step + 1}: {rate:.4f} of the full rate in {config.name}")
