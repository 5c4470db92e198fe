"""Who works on a run: `handle.json`, what a backend needs to find the run it was given, or a supervisor in the foreground.

A supervisor that ends in order leaves a last word in `logs/launcher.json`; one that was killed cannot.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import backends, evidence
from trainer import lock
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

FILE, LAST_WORD, LOCK = "handle.json", "launcher.json", "handle.lock"
SUBMITTED = "ORTHOGON_SUBMITTED"
"""In the environment of a supervisor that a backend started: its handle is the backend's."""
PATIENCE_SECONDS = 30.0
"""What a supervisor gives the process that started it, to write its handle."""
INSIDE = (SUBMITTED, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")


def read(folder: Path) -> dict[str, Any] | None:
    """The handle of a run, if it has one that can be read."""
    handle = evidence.record(folder / FILE)
    return handle if handle is not None and isinstance(handle.get("backend"), str) else None


def resume_command(handle: dict[str, Any] | None, reference: str) -> str:
    """The command that goes on with a run where it was; `reference` is how a command names the run."""
    on = f" --on {handle['backend']}" if handle is not None and not handle.get("foreground") else ""
    return f"orthogon resume {reference}{on}"


def states(
    pairs: Sequence[tuple[Path, dict[str, Any] | None]],
) -> list[tuple[dict[str, Any] | None, tuple[str, str]]]:
    """The handles with what their backends say of them; ("none", "") without a handle."""
    found: dict[int, tuple[str, str]] = {}
    by_backend: dict[str, list[int]] = {}
    for number, (_, handle) in enumerate(pairs):
        if handle is not None:
            by_backend.setdefault(handle["backend"], []).append(number)
    for name, numbers in by_backend.items():
        asked = [(pairs[number][0], pairs[number][1] or {}) for number in numbers]
        found |= dict(zip(numbers, _ask(name, asked), strict=True))
    return [(handle, found.get(number, ("none", ""))) for number, (_, handle) in enumerate(pairs)]


def _ask(name: str, pairs: list[tuple[Path, dict[str, Any]]]) -> list[tuple[str, str]]:
    try:
        backend = backends.find(name)
        many = getattr(backend, "states", None)
        return list(many(pairs)) if many else [backend.state(folder, handle) for folder, handle in pairs]
    except RunError as error:
        return [("unknown", error.what)] * len(pairs)


def start(
    config: RunConfig, folder: Path, name: str, options: Any, *, resume: bool, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Give a run to a backend and keep the handle; two at once get one run, and the other a sentence.

    Raises:
        RunError: somebody works on the run already, the backend does not take it, or the handle cannot be written (then
            what was started is ended again).
    """
    backend = backends.find(name)
    with _alone(folder):
        check_free(folder)
        handle = backend.submit(config, folder, options, resume=resume, after=list(after))
        record = _record(folder, name, vars(options), handle)
        try:
            write_json(folder / FILE, record)
        except OSError as error:
            backend.cancel(folder, handle, True)
            raise _unwritable(folder, error) from None
    return record


def withdraw(folder: Path) -> None:
    """Remove a run that was made to be started and that its backend refused; not one that somebody else has taken meanwhile."""
    with ExitStack() as held:
        try:
            held.enter_context(_alone(folder))
        except RunError as error:
            if error.outcome is not Outcome.NO_SPACE:  # else nobody else could take it either
                return
        if read(folder) is None and not evidence.attempts(folder):
            shutil.rmtree(folder, ignore_errors=True)


def check_free(folder: Path, me: dict[str, Any] | None = None) -> None:
    """Nobody works on the run, or will; with `me`, nobody but this supervisor, or the job that it is in.

    Raises:
        RunError: somebody does.
    """
    lock.check_free(folder)
    handle, (word, detail) = states([(folder, read(folder))])[0]
    inside = _queued() and handle is not None and handle["backend"] != "torchrun"
    mine = me is not None and (inside or _is(handle, me))
    if handle is not None and word in ("pending", "running") and not mine:
        raise RunError(
            f"run {folder.name} is {word} already on {handle['backend']}: {detail}",
            where=str(folder / FILE),
            mend=f"watch it with `orthogon status {folder.name}`, or end it with `orthogon cancel {folder.name}`",
        )


def supervised(folder: Path, options: dict[str, Any], work: Callable[[], int]) -> int:
    """Do a supervisor's work, and leave word of it: who works on the run, and how it ended; returns the exit code.

    Args:
        options: those of the backend torchrun.

    Raises:
        RunError: somebody else works on the run; whatever `work` raises.
    """
    me = identity()
    if not _queued():
        submitted = bool(os.environ.get(SUBMITTED))  # then who did so holds the lock until it has written the handle,
        with _alone(folder, PATIENCE_SECONDS if submitted else 0.0):
            check_free(folder, me)
            if not submitted or not _is(read(folder), me):  # unless it was killed before
                mine = (options, me) if submitted else ({}, me | {"foreground": True})
                with suppress(OSError):  # the run matters more
                    write_json(folder / FILE, _record(folder, "torchrun", *mine))
    code, message = Outcome.BUG.code, "it broke"
    try:
        code = work()
        message = ""
    except RunError as error:
        code, message = error.outcome.code, error.what
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        with suppress(OSError):
            write_json(folder / "logs" / LAST_WORD, {**me, "exit_code": code, "message": message, "time": time.time()})
    return code


def identity(pid: int | None = None) -> dict[str, Any]:
    """What tells a process from all others, before and after it."""
    pid = os.getpid() if pid is None else pid
    return {"pid": pid, "started": lock.start_of(pid), "host": socket.gethostname()}


def last_word(folder: Path, handle: dict[str, Any]) -> dict[str, Any] | None:
    """How the supervisor of a handle ended, if it could say so."""
    word = evidence.record(folder / "logs" / LAST_WORD)
    same = word is not None and all(word.get(key) == handle.get(key) for key in ("pid", "started", "host"))
    return word if same else None


def _record(folder: Path, name: str, options: dict[str, Any], handle: dict[str, Any]) -> dict[str, Any]:
    """`attempts` is the number of the newest attempt of before: its outcome says nothing about this handle."""
    before = evidence.newest_attempt(folder)
    return {"backend": name, "options": options, "submitted": time.time(), "attempts": before, **handle}


def _is(handle: dict[str, Any] | None, me: dict[str, Any]) -> bool:
    """Whether a handle is that of this supervisor."""
    return all((handle or {}).get(key) == me[key] for key in me)


def _queued() -> bool:
    """Whether this process is in a job of a queue, whose handle stands for it."""
    return not os.environ.get(SUBMITTED) and any(os.environ.get(name) for name in INSIDE)


@contextmanager
def _alone(folder: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """No other process gives the run to anybody meanwhile; the kernel drops the lock of a process that dies."""
    try:
        file = open(folder / LOCK, "w", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with file:
        deadline = time.monotonic() + patience_seconds
        while not lock.taken(file):
            if time.monotonic() >= deadline:
                raise RunError(
                    f"run {folder.name} is being started by another process", where=str(folder), mend="wait for it"
                )
            time.sleep(0.02)
        yield


def _unwritable(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"the run folder cannot be written: {error.strerror}",
        where=str(folder),
        mend="make room" if Outcome.of_errno(error.errno) is Outcome.NO_SPACE else "make it writable",
        outcome=Outcome.of_errno(error.errno),
    )
