"""Verbs that look after a run: status, logs, cancel."""

from __future__ import annotations

import json as json_format
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from launch import ledger, process, standing
from launch.verbs.options import Json, RunName, Runs
from trainer.outcome import Outcome, RunError

POLL_SECONDS, MOST_SECONDS = 0.5, 4.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """Tell how a run stands: state and why, phase of each rank, progress, time left, checkpoint, attempts.

    For why it stopped, in detail, see `orthogon report`.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.status import show, status

        folder = known(self.run, self.runs)
        found = status(folder, process.reference(self.run, _runs(folder, self.runs)))
        if self.json:
            print(json_format.dumps(found))
        else:
            print(show(found))
        return 0


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Print the last lines of all ranks of a run and of its launcher, each with its name before it."""

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on until the run has ended, over all its attempts."""
    rank: int | None = None
    """This rank alone."""
    attempt: int | None = None
    """The attempt; none takes the newest."""
    lines: int = 20
    """How many of the last lines of each file come first."""
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.tail import Tail

        folder = known(self.run, self.runs)
        tail = Tail(folder, self.rank, self.attempt)
        for line in tail.last(self.lines):
            print(line)
        if not self.follow:
            return 0
        asked, said = 0.0, ""
        while True:
            now = time.monotonic()
            found = standing.read(folder) if now - asked > 4 * POLL_SECONDS else None
            asked = now if found else asked
            for line in tail.new():
                print(line, flush=True)
            if found and found.state == "pending" and found.note != said:
                said = found.note
                print(f"pending: {said}", flush=True)
            if found and not found.alive:
                print(f"run {found.name}: {found.state}: {found.note}", flush=True)
                return 0
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """End a run: it saves first. It can be resumed.

    Waits until it has ended. What is not running is left as it is.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    now: bool = False
    """Do not save: kill it, and lose the steps since the newest checkpoint."""
    no_wait: bool = False
    """Return once it is asked to end."""
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch import backends, handles

        folder = known(self.run, self.runs)
        found = standing.read(folder)
        handle = handles.read(folder)
        if not found.alive and found.state != "unknown":
            print(f"run {self.run} is not running: {found.state}: {found.note}")
            ledger.remember(folder, found=found)
            return 0
        if handle is None:
            from trainer.lock import Lock, describe

            raise RunError(
                f"run {self.run} was not given to a backend: {describe(Lock.owner(folder))} works on it",
                where=str(folder),
                mend="send that process SIGTERM: it saves and ends",
            )
        print(backends.find(handle["backend"]).cancel(folder, handle, self.now), flush=True)
        pause = POLL_SECONDS
        while not self.no_wait and found.alive:
            time.sleep(pause)
            pause = min(2 * pause, MOST_SECONDS)  # a queue's controller serves others, too
            found = standing.read(folder)
        ledger.remember(folder)
        if not self.no_wait:
            print(f"run {self.run} has ended: {found.state}: {found.note}")
            if found.state != Outcome.FINISHED.value:
                reference = process.reference(self.run, _runs(folder, self.runs))
                print(f"go on with: {handles.resume_command(handle, reference)}")
        return 0


def known(name: str, runs: Path) -> Path:
    """The folder of a run: in `runs`, else where the ledger says that a run of this name lies.

    Raises:
        RunError: it is no run name, there is none, or there are several.
    """
    try:
        return process.run_folder(name, runs)
    except RunError:
        found = ledger.named(name) if runs == Path("runs") and Path(name).name == name else []
        if len(found) == 1:
            return found[0]
        if found:
            places = ", ".join(str(folder.parent) for folder in found)
            raise RunError(
                f"there are {len(found)} runs {name}", where="the ledger", mend=f"say which by --runs: {places}"
            ) from None
        raise


def _runs(folder: Path, given: Path) -> Path:
    """What a command has to say about where the run lies."""
    return given if folder.parent.resolve() == given.resolve() else folder.parent
