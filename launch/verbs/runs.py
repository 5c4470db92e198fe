"""Verbs that train: run, resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch import process
from launch.verbs.options import RunName, Runs
from trainer.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train a configuration in the foreground through torchrun.

    `--section.key=value` overrides the file.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""
    dry_run: bool = False
    """Print the command and the configuration, and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        import yaml

        from launch.backends import torchrun
        from trainer import config as configuration
        from trainer import runfolder

        config = configuration.load(self.config, overrides)
        if self.dry_run:
            print(yaml.safe_dump(configuration.resolved(config), sort_keys=False))
            print(" ".join(torchrun.attempt_command(config, config.folder, 1)))
            return 0
        return attempt(config, runfolder.create(config, runfolder.command_line()))


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest checkpoint that verifies.

    `--section.key=value` overrides what a resume may change.
    """

    OVERRIDES: ClassVar[bool] = True
    run: RunName
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from trainer import runfolder

        folder, config = process.opened(self.run, self.runs, overrides)
        if overrides:
            runfolder.write_config(folder, config)
        return attempt(config, folder)


def attempt(config: Any, folder: Path) -> int:
    """One attempt in the foreground, and what follows it."""
    from launch.backends import torchrun
    from trainer import runfolder

    number = runfolder.new_attempt(folder)
    outcome = torchrun.run(config, folder, number)
    word = outcome["outcome"]
    log = folder / "logs" / str(number)
    print(
        f"{word}: {outcome['message']}" if not outcome["message"].startswith("error:") else outcome["message"],
        flush=True,
    )
    if word == Outcome.FINISHED.value:
        return process.task("finish", str(folder))
    name = process.reference(config.name, Path(config.runs))
    if word in (Outcome.PREEMPTED.value, Outcome.INFRASTRUCTURE.value, Outcome.NO_SPACE.value):
        print(f"go on with: orthogon resume {name}")
    if word in (Outcome.BUG.value, Outcome.INFRASTRUCTURE.value):
        print(f"logs: {log}/rank-*.log, {log}/torchrun.log")
    return int(outcome["exit_code"])
