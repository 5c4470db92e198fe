"""What a rank is doing, in a small memory-mapped file: readable while it works, and after it was killed. Imports no torch.

Two threads write: the main thread its phase at each change, the watchdog every moment that the process is alive. A rank
that computes is fresh in both; one that hangs is fresh in the second only; one that is stopped or dead is in neither.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

# Phase record: pid, beats, step, position, wall time of the phase's begin, phase, signal, host; then its CRC. A second
# region holds the wall time of the last sign of life, written alone and in one store.
_RECORD = struct.Struct("<qqqqd32s16s64s")
_CRC, _ALIVE = struct.Struct("<I"), struct.Struct("<d")
_ALIVE_AT = 192
SIZE = 256


@dataclass(frozen=True)
class Beat:
    """A rank's state as its heartbeat file tells it; times are wall times in seconds."""

    pid: int
    beats: int
    """Changes of phase so far: of ranks that work in step, the one with the fewest is behind."""
    step: int
    """Steps that are done."""
    position: int
    since: float
    """When the phase began."""
    phase: str
    signal: str
    """The first signal that came, or empty."""
    host: str
    alive: float
    """The last sign of life."""


class Heartbeat:
    """This rank's heartbeat; with `None` as path it only remembers."""

    def __init__(self, path: Path | None) -> None:
        self.phase, self.step, self.position, self.beats, self.signal = "start-up", 0, 0, 0, ""
        self.changed = time.monotonic()
        self._host = socket.gethostname().encode()[:64]
        self._map: mmap.mmap | None = None
        if path is not None:
            with open(path, "w+b") as file:
                file.truncate(SIZE)
                self._map = mmap.mmap(file.fileno(), SIZE)
        self.live()
        self.beat("start-up")

    def beat(self, phase: str, step: int | None = None, position: int | None = None) -> None:
        """A new phase begins."""
        self.phase, self.beats = phase, self.beats + 1
        self.step = self.step if step is None else step
        self.position = self.position if position is None else position
        self.changed = time.monotonic()
        self._write()

    def told(self, signal: str) -> None:
        """A signal came."""
        self.signal = signal
        self._write()

    def live(self) -> None:
        """A sign of life, from any thread."""
        if self._map is not None:
            _ALIVE.pack_into(self._map, _ALIVE_AT, time.time())

    def _write(self) -> None:
        if self._map is None:
            return
        since = time.time() - (time.monotonic() - self.changed)
        words = (self.phase.encode()[:32], self.signal.encode()[:16], self._host)
        record = _RECORD.pack(os.getpid(), self.beats, self.step, self.position, since, *words)
        self._map[: _RECORD.size + _CRC.size] = record + _CRC.pack(zlib.crc32(record))


def path_of(logs: Path, rank: int) -> Path:
    """The heartbeat file of a rank in the log folder of an attempt."""
    return logs / f"heartbeat-{rank}"


def read(path: Path, tries: int = 5) -> Beat | None:
    """What a heartbeat file tells; None where there is none, or nothing readable."""
    for _ in range(tries):
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != SIZE:
            return None
        record = data[: _RECORD.size]
        if _CRC.unpack_from(data, _RECORD.size)[0] == zlib.crc32(record):
            pid, beats, step, position, since, *words = _RECORD.unpack(record)
            phase, signal, host = (word.rstrip(b"\0").decode(errors="replace") for word in words)
            return Beat(pid, beats, step, position, since, phase, signal, host, _ALIVE.unpack_from(data, _ALIVE_AT)[0])
        time.sleep(0.001)  # it was being written
    return None


def read_all(logs: Path) -> dict[int, Beat]:
    """The heartbeats of all ranks of an attempt, by rank."""
    found = {}
    for path in logs.glob("heartbeat-*"):
        beat = read(path)
        if beat is not None and path.name.removeprefix("heartbeat-").isdigit():
            found[int(path.name.removeprefix("heartbeat-"))] = beat
    return dict(sorted(found.items()))
