"""`metrics.jsonl`, the truth about a run: one line per step, steps strictly increasing, cut at resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import Lines
from trainer.metrics.follow import HURRY, PATIENCE, Follower

# How the names of what depends on the clock end; all else of a record repeats bit for bit.
TIMINGS = ("seconds", "per_second", "mfu")


class History:
    """Appends records, and hands them to the followers; `None` as path (ranks other than 0) writes nothing."""

    def __init__(self, path: Path | None, followers: Sequence[Follower] = ()) -> None:
        self.path, self.followers = path, followers
        self._lines = Lines(path, point="history.write") if path else None

    def write(self, **record: Any) -> None:
        """Append one record; while the disk is full it waits in memory."""
        if self._lines:
            self._lines.write(json.dumps(record))
            for follower in self.followers:
                follower.put(record)

    def close(self, *, hurry: bool = False) -> None:
        """Close the file, and give the followers some time to send the rest, less in a hurry."""
        if self._lines:
            self._lines.close()
            deadline = time.monotonic() + (HURRY if hurry else PATIENCE)
            for follower in self.followers:
                follower.close(deadline)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a history; a torn last line (the writer was killed) is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its timings: what an equal run repeats."""
    return {key: value for key, value in record.items() if not key.endswith(TIMINGS)}


def cut(path: Path, step: int) -> None:
    """Drop the records after `step`, those that wait for the disk too: a run that went back writes them again.

    The file is cut in place, which takes no space and leaves an open history right.
    """
    Lines(path).keep(lambda line: json.loads(line)["step"] <= step)
    if not path.exists():
        return
    end = 0
    with open(path, "rb+") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            end += len(line)
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
