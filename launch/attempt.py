"""One attempt on this node: torchrun is started, watched and ended, and what it left is put into one record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import children, evidence
from launch.culprit import ranks as names
from launch.retry import Attempt, digest_of
from trainer.files import write_json
from trainer.outcome import Outcome

POLL_SECONDS = 0.1
ORDERLY_SECONDS, BROKEN_SECONDS = 60.0, 30.0
"""What torchrun gets to end by itself after an orderly outcome, and after another one or the death of a rank."""
FILE = "attempt.json"


def nothing() -> str:
    return ""


def watch(
    child: children.Child,
    logs: Path,
    log: str,
    asked: children.Asked,
    gone: Callable[[], str] = nothing,
    patience: float = math.inf,
) -> str:
    """Wait until an attempt has ended on this node; returns why it was ended from here, empty if it ended by itself.

    The first signal to this process goes on to torchrun, once: a second one would cut its patience with the ranks short.
    torchrun is ended when it outlives the outcome or the death of a rank: it may wait for ranks that will never answer,
    and, where it does not host the rendezvous, for the one that does.

    Args:
        log: the name of torchrun's log in `logs`.
        gone: which peer is gone, if one is; called all the time.
        patience: seconds that the child gets after a signal; torchrun has a patience of its own.
    """
    forwarded, overdue, deadline, why, looked = False, math.inf, None, "", 0.0
    while child.poll() is None:
        if asked.signal is not None and not forwarded:
            forwarded = True
            child.send_signal(asked.signal)
            overdue = time.monotonic() + patience
        now = time.monotonic()
        if deadline is None and now - looked > 0.5:
            looked = now
            outcome = evidence.told(logs)
            if outcome is not None:
                orderly = Outcome(outcome["outcome"]).orderly
                deadline, why = now + (ORDERLY_SECONDS if orderly else BROKEN_SECONDS), "it outlived the outcome"
            elif evidence.failed(logs / log):
                deadline, why = now + BROKEN_SECONDS, "it outlived a rank that failed"
        lost = gone()
        if lost or now > overdue or (deadline is not None and now > deadline):
            children.end(child)
            return lost or why or "it outlived a signal"
        time.sleep(POLL_SECONDS)
    children.sweep(child)
    return ""


def close(folder: Path, number: int, asked: bool, began: float, ended: str) -> dict[str, Any]:
    """Judge an attempt that has ended on all nodes, and record it in `logs/N/attempt.json`.

    Returns:
        The outcome of its ranks, or what their absence means, with `checkpoint` (the newest step that is saved), `asked`,
        `seconds` and `ended` (why the launcher ended it, or empty).
    """
    logs = folder / "logs" / str(number)
    checkpoint = evidence.newest_checkpoint(folder) or 0
    outcome = evidence.told(logs)
    if outcome is None or (outcome.get("lost_peers") and any(death.signal for death in evidence.deaths(logs))):
        outcome = silent(logs, asked, checkpoint, ended)  # who was killed says more than who noticed
    record = {
        **outcome, "attempt": number, "checkpoint": checkpoint, "asked": asked,
        "seconds": round(time.time() - began, 1), "ended": ended,
    }  # fmt: skip
    write_json(logs / FILE, record)
    return record


def silent(logs: Path, asked: bool, checkpoint: int, ended: str = "") -> dict[str, Any]:
    """What it means that no rank wrote an outcome."""
    outcome, killed, hung = Outcome.INFRASTRUCTURE, [d for d in evidence.deaths(logs) if d.signal], evidence.hangs(logs)
    if killed:
        message = f"rank {killed[0].rank} was killed by {killed[0].signal}"
    elif any(note.get("why") != "parent is gone" for note in hung.values()):
        whys = [str(note.get("why")) for note in hung.values()]
        message = f"{names(list(hung))} ended: {next((why for why in whys if why != 'another rank hangs'), whys[0])}"
    elif hung:
        message = "torchrun was killed"
    elif asked and evidence.steps_done(logs) <= checkpoint:
        outcome, message = Outcome.PREEMPTED, "a signal came before the first step; nothing is lost"
    elif ended:
        message = f"no outcome was written; the launcher ended the attempt: {ended}"
    else:
        message = "no outcome was written: the ranks were killed"
    return {"outcome": outcome.value, "exit_code": outcome.code, "message": message, "time": time.time()}


def for_retry(folder: Path, record: dict[str, Any]) -> Attempt:
    """A record as the decision on a retry takes it."""
    outcome, message = Outcome(record["outcome"]), str(record["message"])
    traceback, told = "", outcome is Outcome.BUG and message.startswith("error:")
    if outcome is Outcome.BUG:
        log = folder / "logs" / str(record["attempt"]) / f"rank-{record.get('rank', 0)}.log"
        traceback = digest_of(evidence.traceback_of(log), message)
    planned = outcome is Outcome.PREEMPTED and "train.time_limit" in message
    return Attempt(outcome, record["checkpoint"], traceback, record["asked"], told, planned)
