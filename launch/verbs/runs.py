"""Verbs that train: run, resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch import process
from launch.retry import RESTARTS
from launch.verbs.options import Cluster, On, Restarts, RunName, Runs
from trainer.outcome import Outcome, RunError


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train a configuration in the foreground through torchrun.

    `--section.key=value` overrides the file. An attempt that is lost to a dead rank, a hang or a preemption is followed
    by another one, from the newest checkpoint.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""
    dry_run: bool = False
    """Print the command and the configuration, and start nothing."""
    make_only: bool = False
    """Make the run folder and start nothing: `orthogon node` or `resume` will."""
    restarts: Restarts = RESTARTS

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
        folder = runfolder.create(config, runfolder.command_line())
        if self.make_only:
            from launch import ledger

            ledger.remember(folder)
            print(f"made {folder}")
            return 0
        return train(config, folder, self.restarts)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest checkpoint that verifies.

    `--section.key=value` overrides what a resume may change. With `--on` or `--cluster` it goes on in the background or in a
    queue, as `orthogon submit` starts one; the options that it was last submitted with hold, unless others are given.
    """

    OVERRIDES: ClassVar[bool] = True
    run: RunName
    verify: bool = False
    """First train the last recorded steps again and compare them bit for bit, on the number of ranks that saved."""
    restarts: Restarts | None = None
    on: On = None
    cluster: Cluster = None
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch import handles
        from trainer import runfolder

        if self.on is not None or self.cluster is not None:
            return self._give(overrides)
        folder, config = process.opened(self.run, self.runs, overrides)
        handles.check_free(folder, handles.identity())
        if overrides:
            runfolder.write_config(folder, config)
        return train(config, folder, RESTARTS if self.restarts is None else self.restarts, self.verify)

    def _give(self, given: list[str]) -> int:
        """Resume through a backend."""
        from launch import handles
        from launch.choices import choose
        from launch.verbs.submit import started
        from trainer import runfolder

        if self.verify:
            raise RunError("--verify works in the foreground", where="command line", mend="leave out --on")
        restarts = [] if self.restarts is None else [f"--restarts={self.restarts}"]
        before = handles.read(process.run_folder(self.run, self.runs))
        on, options, overrides = choose(self.on, self.cluster, [*restarts, *given], before)
        folder, config = process.opened(self.run, self.runs, overrides)
        handles.check_free(folder)
        if overrides:
            runfolder.write_config(folder, config)
        started(config, folder, on, options, resume=True)
        return 0


def train(config: Any, folder: Path, restarts: int, verify: bool = False) -> int:
    """Attempts in the foreground, and what follows the last; the ledger knows of them."""
    from launch import handles, ledger
    from launch.supervisor import supervise

    def work() -> int:
        ledger.remember(folder)
        return told(config, folder, supervise(config, folder, restarts, verify))

    try:
        return handles.supervised(folder, {"restarts": restarts}, work)
    finally:
        ledger.remember(folder)


def told(config: Any, folder: Path, outcome: dict[str, Any]) -> int:
    """Say how a run ended and what to do next; returns the exit code."""
    word, message = outcome["outcome"], outcome["message"]
    log = folder / "logs" / str(outcome["attempt"])
    print(message if message.startswith("error:") else f"{word}: {message}", flush=True)
    if word == Outcome.FINISHED.value:
        return process.task("finish", str(folder))
    name = process.reference(config.name, Path(config.runs))
    if word in (Outcome.PREEMPTED.value, Outcome.INFRASTRUCTURE.value, Outcome.NO_SPACE.value):
        from launch.report import go_on

        print(f"go on with: {go_on(outcome, name, log)}")
    if word in (Outcome.BUG.value, Outcome.INFRASTRUCTURE.value):
        print(f"why: orthogon report {name}; logs: {log}/rank-*.log, {log}/torchrun*.log")
    return int(outcome["exit_code"])
