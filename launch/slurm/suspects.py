"""Nodes that failed, which later jobs of the same folder of runs are not sent to: a file that is forgotten line by line.

`slurm-suspects.jsonl` lies beside the run folders. One line is one observation: time, node, reason, run, job.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from launch import evidence
from launch.slurm import query
from trainer.files import Lines
from trainer.guard import heartbeat

FILE = "slurm-suspects.jsonl"
FORGET_SECONDS = 86400.0
EARLY_SECONDS = 60.0
"""A node on which no rank showed a sign of life is suspect if the attempt ended by itself within this time of its start."""


def read(runs: Path, now: float | None = None) -> dict[str, str]:
    """The suspects of the last day, with the newest reason."""
    now, found = time.time() if now is None else now, dict[str, str]()
    try:
        lines = (runs / FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            one = json.loads(line)
            if now - float(one["time"]) < FORGET_SECONDS:
                found[str(one["node"])] = str(one["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def add(folder: Path, job: str, nodes: Mapping[str, str]) -> None:
    """Note nodes with reasons, seen by a job of the run in `folder`."""
    lines = Lines(folder.parent / FILE, durable=True)
    for node, reason in nodes.items():
        lines.write(json.dumps({"time": time.time(), "node": node, "reason": reason, "run": folder.name, "job": job}))
    lines.close()


def seen(logs: Path, nodes: Iterable[str], *, asked: bool, seconds: float) -> dict[str, str]:
    """Which nodes of an attempt that has ended are to blame, with reasons.

    Args:
        logs: the attempt's folder.
        nodes: its nodes.
        asked: a signal asked for its end: then ranks may be missing because they had not started.
        seconds: how long it took.
    """
    nodes, found = list(nodes), dict[str, str]()
    states = query.node_states()
    for node in nodes:
        if query.is_bad(states.get(node, "")):
            found[node] = f"it is {states[node]}"
    for node, reason in launch_failures(evidence.tail(logs / "srun.log") + evidence.tail(logs / "nodes.log")).items():
        if node in nodes:
            found.setdefault(node, reason)
    alive = {beat.host.partition(".")[0] for beat in heartbeat.read_all(logs).values()}
    if alive and not asked and seconds < EARLY_SECONDS:
        for node in nodes:
            if node.partition(".")[0] not in alive:
                found.setdefault(node, "no rank started on it")
    return found


def launch_failures(text: str) -> dict[str, str]:
    """The nodes that srun blames, with what it says."""
    found = {}
    for node, why in re.findall(r"error: Task launch for \S+ failed on node ([^:\s]+): (.+)", text):
        found[node] = f"srun could not start tasks on it: {why}"
    for node in re.findall(r"error: Node failure on ([^:\s]+)", text):
        found[node] = "it failed while tasks ran on it"
    for node, why in re.findall(r"error: ([^:\s]+): tasks? [\d,-]+: (Bus error)", text):
        found[node] = f"a rank on it died of: {why}"
    return found


def left(suspects: Iterable[str], excluded: Iterable[str], nodes: int, partition: str | None) -> list[str]:
    """The nodes to exclude: the suspects and those that are excluded anyway; without the suspects, if too few nodes would
    be left for the job ever to run."""
    always, more = list(excluded), [node for node in suspects if node not in set(excluded)]
    usable = [node for node, state in query.node_states(partition).items() if not query.is_bad(state)]
    if usable and len(set(usable) - set(always) - set(more)) < nodes:
        return always
    return sorted({*always, *more})
