"""Processes that this one waits for: signals to the launcher go on to them, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from launch import children, forks
from trainer import runfolder
from trainer.outcome import RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the packages importable in a child wherever it starts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | more


def wait(child: children.Child) -> tuple[int, int | None]:
    """Wait for a child; returns its exit code and the last signal that was passed on to it, if any.

    The child is in a session of its own, so that Ctrl-C reaches it once, from here.
    """
    passed: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, passed[-1] if passed else None


def task(*arguments: str) -> int:
    """Run a task that needs torch, `python -m trainer TASK`, in a process of its own; returns its exit code."""
    code, passed = wait(begin(arguments, environment()))
    return 128 + passed if passed and code else code


def begin(words: Sequence[str], environment: Mapping[str, str], log: IO[str] | None = None) -> children.Child:
    """`python -m trainer WORDS` in a session of its own, its stderr in `log`: a fork where this process has all imports."""
    if forks.inside:
        return forks.task([*words], log, environment)
    line = [sys.executable, "-m", "trainer", *words]
    return subprocess.Popen(line, stderr=log, env=dict(environment), start_new_session=True)


def run_folder(name: str, runs: Path) -> Path:
    """The folder of an existing run, by its name.

    Raises:
        RunError: it is no run name, or there is no such run.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise RunError(
            f"'{name}' is no run name", where="command line", mend="give the name alone; --runs=FOLDER says where"
        )
    runfolder.check(runs / name)
    return runs / name


def opened(name: str, runs: Path, overrides: list[str] | None = None) -> tuple[Path, RunConfig]:
    """The folder of an existing run and its configuration, with overrides that a resume allows.

    Raises:
        RunError: as `run_folder`; or an override changes what the run is.
    """
    folder = run_folder(name, runs)
    return folder, runfolder.open_run(folder, overrides)


def reference(name: str, runs: Path) -> str:
    """How a command names a run."""
    return name if runs == Path("runs") else f"{name} --runs={runs}"
