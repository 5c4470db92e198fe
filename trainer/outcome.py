"""The ways a run can end, and the error that ends it with a sentence for people.

torchrun turns every worker's exit code into 1, so the truth about an attempt lies in `logs/ATTEMPT/outcome.json`.
"""

from __future__ import annotations

import errno
import time
from enum import Enum
from pathlib import Path
from typing import Any

from trainer.files import read_json, write_json


class Outcome(Enum):
    """How a run ended; the value is the word in `outcome.json`, `code` the exit code of `orthogon`."""

    FINISHED = "finished"
    BUG = "bug"
    DIVERGED = "diverged"
    OUT_OF_DATA = "out of data"
    INFRASTRUCTURE = "infrastructure"
    NO_SPACE = "no space"
    PREEMPTED = "preempted"
    BAD_CONFIGURATION = "bad configuration"

    @property
    def code(self) -> int:
        return _CODES[self]

    @staticmethod
    def of_errno(number: int | None) -> Outcome:
        """What an error of the system amounts to: a full disk or quota is no space, all else infrastructure."""
        return Outcome.NO_SPACE if number in (errno.ENOSPC, errno.EDQUOT) else Outcome.INFRASTRUCTURE

    @property
    def orderly(self) -> bool:
        """All ranks agreed on the end and left together: exit 0 under torchrun."""
        return self in (Outcome.FINISHED, Outcome.PREEMPTED, Outcome.DIVERGED, Outcome.OUT_OF_DATA)


_CODES = {
    Outcome.FINISHED: 0,
    Outcome.BUG: 1,
    Outcome.DIVERGED: 65,
    Outcome.OUT_OF_DATA: 66,
    Outcome.INFRASTRUCTURE: 69,
    Outcome.NO_SPACE: 73,
    Outcome.PREEMPTED: 75,
    Outcome.BAD_CONFIGURATION: 78,
}


class RunError(Exception):
    """An end with a sentence for people: what is wrong, where, and how to mend it."""

    def __init__(
        self, what: str, *, where: str = "", mend: str = "", outcome: Outcome = Outcome.BAD_CONFIGURATION
    ) -> None:
        super().__init__(what, where, mend, outcome)
        self.what, self.where, self.mend, self.outcome = what, where, mend, outcome

    def __reduce__(self) -> Any:
        return _rebuild, (self.what, self.where, self.mend, self.outcome.value)

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.mend:
            lines.append(f"mend:  {self.mend}")
        return "\n".join(lines)


def _rebuild(what: str, where: str, mend: str, outcome: str) -> RunError:
    return RunError(what, where=where, mend=mend, outcome=Outcome(outcome))


def write_outcome(folder: Path, outcome: Outcome, message: str, **facts: Any) -> None:
    """Write `outcome.json` into the attempt's log folder, atomically."""
    record = {"outcome": outcome.value, "exit_code": outcome.code, "message": message, "time": time.time(), **facts}
    write_json(folder / "outcome.json", record)


def speak(folder: Path, outcome: Outcome, message: str, *, lost_peers: bool = False, **facts: Any) -> None:
    """Write the outcome of a rank that ends by itself, out of step with the others.

    The first such word stands, but one that only tells of the end of others (`lost_peers`) gives way to the cause.
    """
    if (folder / "outcome.json").exists() and (lost_peers or not read_outcome(folder).get("lost_peers")):
        return
    write_outcome(folder, outcome, message, lost_peers=lost_peers, **facts)


def read_outcome(folder: Path) -> dict[str, Any]:
    """The outcome of an attempt; a missing or unreadable file means infrastructure: the ranks died without a word."""
    try:
        record: dict[str, Any] = read_json(folder / "outcome.json")
        Outcome(record["outcome"])
        return record
    except (OSError, ValueError, KeyError, TypeError):
        lost = Outcome.INFRASTRUCTURE
        return {
            "outcome": lost.value,
            "exit_code": lost.code,
            "message": "no outcome was written: the ranks were killed",
        }
