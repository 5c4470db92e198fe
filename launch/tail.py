"""The log files of a run as one stream of lines, each with the name of its file before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch import backends, evidence, handles
from trainer.outcome import RunError


class Tail:
    """Reads the logs of a run, of its newest attempt if none is given, and goes on with the next one when it begins."""

    def __init__(self, folder: Path, rank: int | None = None, attempt: int | None = None) -> None:
        """
        Raises:
            RunError: there is no such attempt, or no such rank in it.
        """
        self.folder, self.rank, self.fixed = folder, rank, attempt
        self.attempt = evidence.newest_attempt(folder) if attempt is None else attempt
        self._read: dict[Path, int] = {}
        known = evidence.attempts(folder)
        if attempt is not None and attempt not in known:
            raise RunError(
                f"run {folder.name} has no attempt {attempt}",
                where=str(folder / "logs"),
                mend=f"attempts: {', '.join(map(str, known)) or 'none'}",
            )
        if rank is not None and self.attempt and not self.files():
            there = [p.stem.removeprefix("rank-") for p in evidence.logs_of(folder, attempt) if p.stem[:5] == "rank-"]
            raise RunError(
                f"attempt {self.attempt} has no log of rank {rank}",
                where=str(folder / "logs" / str(self.attempt)),
                mend=f"ranks: {', '.join(there) or 'none'}",
            )

    def files(self) -> list[Path]:
        """The files that there are now: of an attempt that was asked for its own only, else the launcher's, too."""
        handle = handles.read(self.folder)
        if self.fixed is not None or handle is None:
            found = evidence.logs_of(self.folder, self.fixed)
        else:
            try:
                found = backends.find(handle["backend"]).logs(self.folder, handle)
            except RunError:
                found = evidence.logs_of(self.folder)
        return found if self.rank is None else [path for path in found if path.stem == f"rank-{self.rank}"]

    def last(self, count: int) -> Iterator[str]:
        """The last lines of each file; what follows them is `new`."""
        for path in self.files():
            data = _read(path, 0)
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = len(whole)
            lines = whole.decode("utf-8", errors="replace").splitlines()
            for line in lines[-count:] if count > 0 else []:
                yield f"[{label(path)}] {line}"

    def new(self) -> Iterator[str]:
        """Whole lines that were written since the last call."""
        newest = evidence.newest_attempt(self.folder)
        if self.fixed is None and newest > self.attempt:
            for path in sorted(self._read):  # what the attempt before wrote last
                yield from self._new_of(path)
            self.attempt = newest
            yield f"--- attempt {newest}"
        for path in self.files():
            yield from self._new_of(path)

    def _new_of(self, path: Path) -> Iterator[str]:
        start = self._read.get(path, 0)
        data = _read(path, start)
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = start + len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            yield f"[{label(path)}] {line}"


def label(path: Path) -> str:
    """What stands before a line: `rank 1`, `torchrun`, `torchrun n2`, `launcher`."""
    return path.stem.replace("-", " ", 1)


def _read(path: Path, start: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read()
    except OSError:
        return b""
