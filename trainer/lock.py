"""One run folder, one writer: a lock in the run folder that the writing run holds. Imports no torch.

The kernel keeps the lock (`fcntl.lockf`) and drops it when its owner dies, however it dies. The file's content tells people
and other programs who owns it. Where the file system has no locks, the content is the lock: then an owner on the same
host is alive while its process is, and one on another host while the file is touched.

POSIX locks have a trap: closing any descriptor of the file drops the lock of the whole process. In the holder's own
process nothing but the holder opens the file, hence `_held`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from trainer.files import write_text
from trainer.outcome import Outcome, RunError

FILE = "lock"
FRESH = 120.0
"""Seconds since the last touch within which an owner on another host counts as alive, where there are no locks."""
_POLL, _TURN_POLL = 0.1, 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BUSY = (errno.EACCES, errno.EAGAIN)
_FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, pid


class Lock:
    """The lock of a run folder, held until `release` or the end of the process."""

    _held: dict[Path, Lock] = {}

    def __init__(self, path: Path, record: dict[str, Any], file: int | None) -> None:
        self.path, self.record, self._file = path, record, file
        self.left_behind = ""
        """Whose lock was found without a living owner, as a sentence; empty if nobody's."""

    @classmethod
    def acquire(cls, folder: Path, attempt: int, patience_seconds: float) -> Lock:
        """Take the lock of the run in `folder`, in the process of rank 0.

        Raises:
            RunError: another process holds it and does not let go within the patience, or the folder cannot be written.
        """
        path = folder.absolute() / FILE
        record = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()), "attempt": attempt,
            "time": time.time(),
        }  # fmt: skip
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                lock, owner = cls._held.get(path), None
                if lock is not None:
                    owner = lock.record
                else:
                    lock, owner = _try(path, record)
                    if lock is not None:
                        cls._held[path] = lock
                        return lock
            except OSError as error:
                raise RunError(
                    f"the run folder cannot be locked: {error.strerror}",
                    where=str(path),
                    mend="make it writable",
                    outcome=Outcome.of_errno(error.errno),
                ) from None
            if time.monotonic() >= deadline:
                raise RunError(
                    f"run {folder.name} is being written by {describe(owner)}",
                    where=str(path),
                    mend="stop that one, or wait until it ends",
                    outcome=Outcome.INFRASTRUCTURE,
                )
            time.sleep(_POLL)

    def touch(self) -> None:
        """A sign of life, from any thread, every few seconds: it counts where there are no locks."""
        with suppress(OSError):
            os.utime(self.path if self._file is None else self._file)

    def release(self) -> None:
        """Let go; the file stays, empty."""
        if self._held.pop(self.path, None) is None:
            return
        with suppress(OSError):
            if self._file is None:
                write_text(self.path, "")
            else:
                os.ftruncate(self._file, 0)
        if self._file is not None:
            os.close(self._file)  # which drops the lock

    @classmethod
    def owner(cls, folder: Path) -> dict[str, Any] | None:
        """Who holds the run's lock now: host, pid, attempt and time (since when), or nothing. Disturbs nobody."""
        path = folder.absolute() / FILE
        mine = cls._held.get(path)
        if mine is not None:
            return mine.record
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            record = _parse(os.pread(file, 4096, 0))
            try:
                held = _held_by_another(file)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                held = record is not None and _lives(path, record)
            return (record or {}) if held else None
        finally:
            os.close(file)


def beside(folder: Path) -> Path:
    """The lock for `turn` of a folder that gets its name by a rename."""
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def turn(file: Path, what: str, say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time makes `what`; the others wait, where there are locks, and say once for whom.

    Args:
        file: the lock. It stays: whoever waits for a file that was removed waits for nothing.
        check: called while waiting, every half second; may raise.

    Raises:
        OSError: the file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b", buffering=0) as held:
        waiting = False
        while not taken(held):
            if not waiting:
                held.seek(0)
                say(f"waiting for {held.read().decode() or 'another process'}, which makes {what}")
            waiting = True
            check()
            time.sleep(_TURN_POLL)
        with suppress(OSError):  # who it is matters less than that it goes on
            os.ftruncate(held.fileno(), 0)
            held.write(f"pid {os.getpid()} on host {socket.gethostname()}".encode())
        yield


def taken(file: IO[Any]) -> bool:
    """Try to take the lock of an open file until it is closed: whether it is this process's now, or there are no locks here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY
    return True


def check_free(folder: Path) -> None:
    """Nobody writes the run in `folder` now.

    Raises:
        RunError: somebody does.
    """
    owner = Lock.owner(folder)
    if owner is not None:
        raise RunError(
            f"run {folder.name} is being written by {describe(owner)}",
            where=str(folder / FILE),
            mend="stop that one, or wait until it ends",
        )


def _try(path: Path, record: dict[str, Any]) -> tuple[Lock | None, dict[str, Any] | None]:
    """One attempt: the lock, or who has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    kept = False
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            before = _parse(os.pread(file, 4096, 0))
            if error.errno in _BUSY:
                return None, before
            if error.errno in _NO_LOCKS:
                return _try_record(path, record, before)
            raise
        before = _parse(os.pread(file, 4096, 0))
        os.ftruncate(file, 0)
        os.pwrite(file, _line(record), 0)
        kept = True
    finally:
        if not kept:
            os.close(file)
    return _taken(path, record, file, before), None


def _try_record(
    path: Path, record: dict[str, Any], before: dict[str, Any] | None
) -> tuple[Lock | None, dict[str, Any] | None]:
    """The same without locks: put our record in place of nobody's or a dead one's; of two at once the last one wins."""
    if before is not None and _lives(path, before):
        return None, before
    write_text(path, _line(record).decode())
    time.sleep(_POLL)
    now = _parse(path.read_bytes())
    return (_taken(path, record, None, before), None) if now == record else (None, now)


def _taken(path: Path, record: dict[str, Any], file: int | None, before: dict[str, Any] | None) -> Lock:
    lock = Lock(path, record, file)
    if before is not None:
        lock.left_behind = f"the lock of {describe(before)} was left behind"
    return lock


def describe(record: dict[str, Any] | None) -> str:
    """An owner in words."""
    if not record:
        return "a process that has not told its name"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))
    return f"pid {record['pid']} on host {record['host']} since {since} (attempt {record['attempt']})"


def start_of(pid: int) -> int:
    """When a process of this host began, in clock ticks since the boot; 0 where that is unknown.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        os.kill(pid, 0)
        return 0
    fields = text.rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return int(fields[19])


def _lives(path: Path, record: dict[str, Any]) -> bool:
    """Whether the owner of a record is alive, as far as can be told without locks."""
    if record["host"] == socket.gethostname():
        try:
            return start_of(record["pid"]) in (0, record["started"])
        except ProcessLookupError:
            return False
        except PermissionError:  # of another user
            return True
    return _clock(path.parent) - path.stat().st_mtime < FRESH


def _clock(folder: Path) -> float:
    """The time as the file system's own clock tells it: that of a network file system may be off from ours."""
    probe = folder / f".clock.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _held_by_another(file: int) -> bool:
    if sys.platform == "linux":
        query = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        answer: int = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, query))[0]
        return answer != fcntl.F_UNLCK
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return True
        raise
    return False


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _parse(data: bytes) -> dict[str, Any] | None:
    """The record, or nothing where the file is empty or torn."""
    try:
        record = json.loads(data)
        return record if {"host", "pid", "started", "attempt", "time"} <= record.keys() else None
    except (ValueError, AttributeError):
        return None
