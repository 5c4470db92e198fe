"""Durable files: a file either has its whole new content or its whole old one, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.guard.faults import fault

_BLOCK = 1 << 16


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON form of `value`, atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The JSON form of `value` as `write_json` writes it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


class Lines:
    """Whole lines at the end of a file, in order, whatever the disk does.

    What a full disk does not take is kept in memory, told once, and written before the next line. No half line stays: one
    of a writer that was killed, or of a write that failed, is cut off. Kept lines belong to the file, not to this object:
    whoever appends next in this process writes them first.
    """

    _kept: dict[Path, list[str]] = {}
    _one_at_a_time = threading.Lock()

    def __init__(self, path: Path, *, durable: bool = False, point: str = "") -> None:
        """
        Args:
            durable: fsync after each write.
            point: the fault point that a write passes.
        """
        self.path, self.durable, self.point = path.absolute(), durable, point
        self._file: int | None = None

    def write(self, line: str) -> None:
        """Append one line, given without its end; never raises for an error of the disk."""
        with self._one_at_a_time:
            waiting = self._kept.setdefault(self.path, [])
            waiting.append(line + "\n")
            try:
                self._append("".join(waiting).encode())
                count = len(waiting) - 1
                del self._kept[self.path]
                if count:
                    self._say(f"{self.path.name}: {count} lines that had to wait are written")
            except OSError as error:
                if len(waiting) == 1:
                    self._say(f"{self.path} cannot be written: {error}; its lines wait in memory and are tried again")

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drop those of the lines that wait which are not wanted."""
        with self._one_at_a_time:
            self._kept[self.path] = [line for line in self._kept.get(self.path, []) if wanted(line)]

    def waiting(self) -> int:
        """How many lines wait for the disk."""
        return len(self._kept.get(self.path, []))

    def close(self) -> None:
        """Close the file; lines that wait go on waiting."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, data: bytes) -> None:
        if self.point:
            fault(self.point)
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        end = _end_of_lines(self._file)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            if self.durable:
                os.fsync(self._file)
        except OSError:
            with suppress(OSError):  # if this fails, too, the next write cuts
                os.ftruncate(self._file, end)
            raise

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the log may lie on the same disk
            print(text, flush=True)


def _end_of_lines(file: int) -> int:
    """The size of a file of lines, after a torn last line was cut off."""
    end = os.fstat(file).st_size
    if end and os.pread(file, 1, end - 1) != b"\n":
        size, end = end, 0
        for start in range(size // _BLOCK * _BLOCK, -1, -_BLOCK):
            found = os.pread(file, _BLOCK, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
        os.ftruncate(file, end)
    return end


def fsync_folder(path: Path) -> None:
    """Make renames and new names in the folder `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make the content of `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_name(partial: Path, target: Path) -> None:
    """A folder of files gets its name once all of it is on disk, so that what has the name is whole."""
    for file in partial.iterdir():
        fsync_file(file)
    fsync_folder(partial)
    os.rename(partial, target)
    fsync_folder(target.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files that is not there yet, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in source.iterdir():  # copytree by itself would not say which error stopped it
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial / path.name)
    give_name(partial, target)


def sha256_file(path: Path) -> str:
    """SHA-256 of the content of `path`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON form of `value` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
