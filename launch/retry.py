"""Whether a run is started again after an attempt: a pure function of the attempts so far."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.outcome import Outcome

RESTARTS = 3
"""Restarts in a row that may pass without a newer checkpoint."""
EQUAL_BUGS = 3
"""Equal tracebacks after which a bug is believed to be one."""
SOON, FIRST_PAUSE, LONGEST_PAUSE = 1.0, 5.0, 300.0

NEVER = {
    Outcome.FINISHED: "the run is finished",
    Outcome.DIVERGED: "the run diverged: it would diverge again",
    Outcome.OUT_OF_DATA: "there is no more data",
    Outcome.BAD_CONFIGURATION: "the configuration must be mended first",
    Outcome.NO_SPACE: "only room on the disk helps",
}


@dataclass(frozen=True)
class Attempt:
    """What an attempt left."""

    outcome: Outcome
    checkpoint: int
    """Step of the newest checkpoint at its end; 0 without one."""
    traceback: str = ""
    """Digest of a bug's traceback (`digest_of`)."""
    asked: bool = False
    """The launcher's user, or its scheduler, asked for the end by a signal to the launcher."""
    told: bool = False
    """A bug that the trainer found itself and told as a sentence, e.g. that it cannot repeat the recorded steps."""
    planned: bool = False
    """The run ended itself at `train.time_limit`."""


@dataclass(frozen=True)
class Again:
    """Start the next attempt after a pause."""

    seconds: float
    why: str


@dataclass(frozen=True)
class Stop:
    """Start no further attempt."""

    why: str


def decide(attempts: Sequence[Attempt], start: int, restarts: int = RESTARTS) -> Again | Stop:
    """What follows the last of the attempts.

    Args:
        attempts: those of this launcher, oldest first.
        start: step of the newest checkpoint before the first of them; 0 without one.
        restarts: how many in a row may pass without a newer checkpoint; 0 makes one attempt only.
    """
    last = attempts[-1]
    if last.outcome in NEVER:
        return Stop(NEVER[last.outcome])
    if last.asked:
        return Stop("a signal asked for the end")
    if last.planned:
        return Stop("train.time_limit is reached")
    if last.told:
        return Stop("the trainer itself found what is wrong")
    if restarts == 0:
        return Stop("one attempt was asked for")
    idle = without_progress(attempts, start)
    if last.outcome is Outcome.BUG:
        equal = sum(1 for one in attempts if one.outcome is Outcome.BUG and one.traceback == last.traceback)
        if equal >= EQUAL_BUGS:
            return Stop(f"the same traceback came {equal} times")
        why = f"traceback seen {equal} of {EQUAL_BUGS} times"
    else:
        why = "saved before it ended" if last.outcome is Outcome.PREEMPTED else "may pass"
    if idle > restarts:
        return Stop(f"{idle} attempts in a row made no newer checkpoint")
    if idle == 0:
        return Again(SOON, f"{why}; the checkpoint advanced to step {last.checkpoint}")
    pause = min(FIRST_PAUSE * 2 ** (idle - 1), LONGEST_PAUSE)
    return Again(pause, f"{why}; restart {idle} of {restarts} without a newer checkpoint")


def without_progress(attempts: Sequence[Attempt], start: int) -> int:
    """How many of the last attempts made no checkpoint newer than those before."""
    newest, idle = start, 0
    for one in attempts:
        idle = 0 if one.checkpoint > newest else idle + 1
        newest = max(newest, one.checkpoint)
    return idle


def digest_of(traceback: str, message: str) -> str:
    """What makes a bug the same bug: its frames and the kind of the error. Without a traceback the message without numbers,
    which tell of steps, addresses and processes."""
    frames = re.findall(r'^\s*File "(.+?)", line (\d+), in (\S+)', traceback, re.MULTILINE)
    if frames:
        kinds = re.findall(r"^([A-Za-z_][\w.]*)(?::|$)", traceback, re.MULTILINE)
        return _short(f"{frames} {kinds[-1:]}")
    return _short(re.sub(r"0x[0-9a-f]+|\d+", "N", message))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
