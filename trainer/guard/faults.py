"""Faults on purpose: named points of the code where a test or a drill kills, stalls or poisons one rank. Imports no torch.

    ORTHOGON_FAULTS="kill@save.after_shard rank=1 step=20; sleep=30@step.forward attempt=1; ENOSPC@save.write times=2"

A fault is `KIND@POINT`, with `rank`, `step` and `attempt` where it should not strike on every one, and `times` where it
should strike more than once in a process. Kinds: `kill` (SIGKILL), `stop` (SIGSTOP), `segv`, `term`, `usr1`, `int` (that signal to
the process itself), the name of an errno (`ENOSPC`, `EDQUOT`, `EIO`, `EROFS`: raised as OSError), `error` (a plain
RuntimeError, as a bug raises it), `sleep=SECONDS`, and for points that guard a number `nan`, `inf` and `scale=FACTOR`.
Without the variable a point costs one comparison.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from dataclasses import dataclass, field

VARIABLE = "ORTHOGON_FAULTS"

POINTS = (
    "start.begin", "start.data", "start.model", "start.restored",
    "step.data", "step.loss", "step.gradient", "step.forward", "step.agreed", "step.updated", "step.border",
    "validate.batch",
    "save.begin", "save.write", "save.after_shard", "save.hash", "save.before_manifest", "save.after_manifest",
    "save.rename", "save.renamed", "save.prune", "save.background",
    "load.verified", "load.read",
    "history.write", "end.begin", "end.outcome", "cache.part",
)  # fmt: skip
"""Every point of the code, in the order in which a run passes them."""

SIGNALS = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT,
    "segv": signal.SIGSEGV,
}  # fmt: skip
WHERE = ("rank", "step", "attempt")


@dataclass
class Fault:
    """One fault and where it strikes."""

    kind: str
    point: str
    value: float = math.nan
    """Seconds of a sleep, factor of a scaling."""
    where: dict[str, int] = field(default_factory=dict)
    times: int = 1


def parse(text: str) -> list[Fault]:
    """The faults that `ORTHOGON_FAULTS` names.

    Raises:
        ValueError: a kind, point or word that does not exist.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        what, *words = part.split()
        kind, _, point = what.partition("@")
        kind, _, value = kind.partition("=")
        known = kind in SIGNALS or kind in ("nan", "inf", "scale", "sleep", "error") or hasattr(errno, kind)
        if not known or point not in POINTS or (kind in ("scale", "sleep")) != bool(value):
            raise ValueError(f"{VARIABLE}: '{what}' is no fault; KIND@POINT, points: {', '.join(POINTS)}")
        pairs = dict(word.split("=", 1) for word in words)
        if not pairs.keys() <= {*WHERE, "times"}:
            raise ValueError(f"{VARIABLE}: '{part}': a fault takes {', '.join(WHERE)} and times")
        times = int(pairs.pop("times", "1"))
        number = float(value) if value else {"nan": math.nan, "inf": math.inf}.get(kind, math.nan)
        found.append(Fault(kind, point, number, {key: int(text) for key, text in pairs.items()}, times))
    return found


_faults: list[Fault] = []
_here: dict[str, int] = {}


def arm(text: str) -> None:
    """Ask for the faults of `text` and no others."""
    _faults[:] = parse(text)


arm(os.environ.get(VARIABLE, ""))


def locate(**where: int) -> None:
    """Tell where this process is: `rank`, `attempt` or `step` (the one that is computed, counted from 1)."""
    _here.update(where)


def fault(point: str) -> float:
    """Strike, if a fault is asked for here.

    Returns:
        What a number that the point guards is to be multiplied by: 1.0 but for a fault of the kinds nan, inf and scale.

    Raises:
        OSError: a fault of the kind of an errno. RuntimeError: a fault of the kind error.
    """
    if not _faults:
        return 1.0
    for one in _faults:
        if one.point != point or one.times < 1 or any(_here.get(key) != at for key, at in one.where.items()):
            continue
        one.times -= 1
        if one.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[one.kind])
        elif one.kind == "sleep":
            time.sleep(one.value)
        elif one.kind == "error":
            raise RuntimeError(f"a fault on purpose at {point}")
        elif one.kind in ("nan", "inf", "scale"):
            return one.value
        else:
            number = getattr(errno, one.kind)
            raise OSError(number, os.strerror(number), f"(a fault on purpose at {point})")
    return 1.0
