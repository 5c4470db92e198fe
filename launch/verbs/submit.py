"""The verb submit, and what it shares with resume: runs that go on without this terminal."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch import backends, ledger, process
from launch.verbs.options import Cluster, On
from trainer.outcome import Outcome, RunError


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Start a run in the background, through a backend.

    Returns at once. `--section.key=value` overrides the file; the backend's own options (`--restarts 5`, `--nodes 4`) stand
    beside them, or in a file (`--cluster`). `--on torchrun` survives the terminal and restarts as `orthogon run` does.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""
    on: On = None
    cluster: Cluster = None
    after: Annotated[tuple[str, ...], arg(metavar="RUN ...")] = ()
    """Runs that must finish first, where the backend can wait for them."""
    dry_run: bool = False
    """Print the configuration and the script or command, and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        import yaml

        from launch import handles
        from launch.choices import choose
        from trainer import config as configuration
        from trainer import runfolder

        on, options, rest = choose(self.on, self.cluster, overrides)
        config = configuration.load(self.config, rest)
        if self.dry_run:
            print(yaml.safe_dump(configuration.resolved(config), sort_keys=False))
            print(backends.find(on).describe(config, config.folder, options))
            return 0
        folder = runfolder.create(config, runfolder.command_line())
        try:
            started(config, folder, on, options, resume=False, after=self.after)
        except RunError as error:
            if (
                error.outcome is not Outcome.INFRASTRUCTURE
            ):  # nothing was started: the same command will do, once mended
                handles.withdraw(folder)
            raise
        return 0


def _options() -> str:
    """The options of all backends, for the help."""
    lines = [
        f"{name}: {', '.join('--' + f.name.replace('_', '-') for f in fields(backends.find(name).Options)) or 'none'}"
        for name in backends.names()
    ]
    return "\n\nOptions of the backends:\n\n" + "\n\n".join(lines)


Submit.__doc__ = inspect.cleandoc(Submit.__doc__ or "") + _options()


def started(config: Any, folder: Path, on: str, options: Any, *, resume: bool, after: Sequence[str] = ()) -> None:
    """Give a run to a backend, write it into the ledger and say what can be done next.

    Raises:
        RunError: as `handles.start`.
    """
    from launch import handles

    handles.start(config, folder, on, options, resume=resume, after=after)
    ledger.remember(folder)
    name = process.reference(config.name, Path(config.runs))
    print(f"run {config.name} is given to {on}: {folder}")
    print(f"  orthogon status {name}\n  orthogon logs {name} -f\n  orthogon cancel {name}")
