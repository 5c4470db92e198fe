"""Attempts at a run on this node, one after another, as `launch/retry.py` decides."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import attempt, children, evidence, forks, retry
from launch.backends import torchrun
from launch.culprit import first_line
from trainer import runfolder

if TYPE_CHECKING:
    from trainer.config import RunConfig

LOG = "torchrun.log"


def supervise(config: RunConfig, folder: Path, restarts: int = retry.RESTARTS, verify: bool = False) -> dict[str, Any]:
    """Run attempts until one ends for good; returns its record (`launch/attempt.py`).

    With `verify`, attempts begin by training the last recorded steps again, until one of them has left a newer checkpoint.

    A signal to this process goes on to the ranks, which save, and means: no attempt after this one.

    Raises:
        RunError: the folder of an attempt cannot be made.
    """
    start, past = evidence.newest_checkpoint(folder) or 0, list[retry.Attempt]()
    with children.Asked() as asked:
        while True:
            verifies = verify and retry.without_progress(past, start) == len(past)
            record = one(config, folder, asked, *(["--verify"] if verifies else []))
            past.append(attempt.for_retry(folder, record))
            decision = retry.decide(past, start, restarts)
            if isinstance(decision, retry.Stop):
                if len(past) > 1:
                    print(f"no further attempt: {decision.why}", flush=True)
                return record
            print(restart_line(record, decision), flush=True)
            runfolder.record_event(
                folder, "restart", attempt=record["attempt"], outcome=record["outcome"], why=decision.why
            )
            pause(decision.seconds, asked)
            if asked.signal is not None:
                return record


def one(config: RunConfig, folder: Path, asked: children.Asked, *options: str) -> dict[str, Any]:
    """One attempt on this node, from its folder to its record."""
    number, began = runfolder.new_attempt(folder), time.time()
    logs = folder / "logs" / str(number)
    with open(logs / LOG, "w", encoding="utf-8") as log:
        child: children.Child
        patience = math.inf
        if forks.inside and torchrun.forkable(config):
            child = forks.rank(["train", str(folder), f"--attempt={number}", *options], log, torchrun.variables(config))
            patience = torchrun.shutdown_seconds(config)
        else:
            line = [*torchrun.attempt_command(config, folder, number), *options]
            child = children.start(line, log, torchrun.variables(config))
        try:
            ended = attempt.watch(child, logs, LOG, asked, patience=patience)
        except BaseException:
            children.end(child)
            raise
        if not ended and isinstance(child, children.Forked) and child.returncode:
            # In torchrun's words, which `evidence` reads.
            log.write(f"failed (exitcode: {child.returncode}) local_rank: 0 (pid: {child.pid})\n")
    return attempt.close(folder, number, asked.signal is not None, began, ended)


def restart_line(record: dict[str, Any], decision: retry.Again) -> str:
    """What a restart prints: why, which attempt, from which checkpoint."""
    where = f"step {record['checkpoint']}" if record["checkpoint"] else "the beginning"
    return (
        f"attempt {record['attempt']} ended ({record['outcome']}: {first_line(record['message'])}); attempt {record['attempt'] + 1} starts in "
        f"{decision.seconds:g} s from {where}: {decision.why}"
    )


def pause(seconds: float, asked: children.Asked) -> None:
    """Wait, but for a signal."""
    until = time.monotonic() + seconds
    while asked.signal is None and time.monotonic() < until:
        time.sleep(0.1)
