"""`metrics.jsonl`, the truth about a run: one line per step, steps strictly increasing, cut at resume."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import write_text
from trainer.metrics.follow import HURRY, PATIENCE, Follower

# How the names of what depends on the clock end; all else of a record repeats bit for bit.
TIMINGS = ("seconds", "per_second", "mfu")


class History:
    """Appends records, and hands them to the followers; `None` as path (ranks other than 0) writes nothing."""

    def __init__(self, path: Path | None, followers: Sequence[Follower] = ()) -> None:
        self.path, self.followers = path, followers
        self._file = open(path, "a", encoding="utf-8", buffering=1) if path else None

    def write(self, **record: Any) -> None:
        """Append one record."""
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            for follower in self.followers:
                follower.put(record)

    def close(self, *, hurry: bool = False) -> None:
        """Close the file, and give the followers some time to send the rest, less in a hurry."""
        if self._file:
            self._file.close()
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
    """Drop the records after `step`: a resumed run writes them again."""
    kept = [record for record in read(path) if record["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
