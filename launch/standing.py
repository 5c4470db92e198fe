"""How a run stands: one word, and why, from its folder and from the backend that it was given to.

A state is never older than the question: `running` needs a living supervisor, or ranks whose signs of life are fresh.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import attempt, evidence, handles
from launch.culprit import first_line
from launch.retry import NEVER
from trainer.guard import heartbeat
from trainer.guard.heartbeat import Beat
from trainer.outcome import Outcome

FRESH_SECONDS = 10.0
ALIVE = ("pending", "starting", "running", "restarting", "finishing")
"""States of a run that somebody works on, or will by himself."""
LASTING = ("new", "lost", "failed", *(outcome.value for outcome in Outcome))
"""States that do not change unless the run's folder does. `unknown` is neither."""
LINEAGE = ("resumed_from", "branched_from", "member_of", "distilled_from")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of a run."""

    folder: str
    name: str
    created: float | None
    backend: str
    state: str
    note: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    attempts: int
    """Number of the newest attempt; 0 without one."""
    stamp: str
    lineage: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(LINEAGE))
    records: list[dict[str, Any]] = field(default_factory=list)
    """The attempts that have ended."""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def read(folder: Path) -> Standing:
    """How the run in a folder stands now."""
    return read_all([folder])[0]


def read_all(folders: Sequence[Path]) -> list[Standing]:
    """How runs stand now; each backend is asked once where it can answer for many."""
    folders = [folder.resolve() for folder in folders]
    stamps = [_stamp(folder) for folder in folders]  # first: what changes while it is read is read again next time
    answers = handles.states([(folder, handles.read(folder)) for folder in folders])
    return [_read(folder, *answer, stamp) for folder, answer, stamp in zip(folders, answers, stamps, strict=True)]


def _read(folder: Path, handle: dict[str, Any] | None, told: tuple[str, str], stamp: str) -> Standing:
    numbers = evidence.attempts(folder)
    logs = folder / "logs" / str(numbers[-1]) if numbers else None
    if logs is not None and (handle is None or numbers[-1] > handle.get("attempts", 0)):
        beats, outcome = heartbeat.read_all(logs), evidence.record(logs / attempt.FILE) or evidence.told(logs)
    else:  # the newest attempt was over before the handle was made: it says nothing about it
        beats, outcome, logs = {}, None, None
    state, note = judge(told, outcome, beats, logs is not None, time.time())
    steps = evidence.last_records(folder / "metrics.jsonl", '"loss":', 1)
    step: dict[str, Any] = steps[0] if steps else {}
    run = evidence.record(folder / "run.json") or {}
    planned = evidence.last_records(folder / "events.jsonl", '"event": "planned"', 1)
    resumed = evidence.last_records(folder / "events.jsonl", '"event": "resumed"', 1)
    return Standing(
        folder=str(folder), name=folder.name, created=run.get("created"), backend=str((handle or {}).get("backend", "-")),
        state=state, note=note, step=int(step.get("step") or 0), steps=int(planned[0]["steps"]) if planned else configured(folder), loss=_number(step.get("loss")),
        tokens_per_second=_number(step.get("tokens_per_second")), attempts=numbers[-1] if numbers else 0, stamp=stamp,
        lineage=lineage(run, resumed), records=_records(folder, numbers),
    )  # fmt: skip


def judge(
    told: tuple[str, str],
    outcome: Mapping[str, Any] | None,
    beats: Mapping[int, Beat],
    started: bool,
    now: float,
) -> tuple[str, str]:
    """The state of a run and why; a pure function.

    Args:
        told: what the backend says of the handle; ("none", "") where there is no handle.
        outcome: that of the newest attempt, if it has one; `asked`, where its launcher was asked for the end.
        beats: the heartbeats of the newest attempt.
        started: there is an attempt.
    """
    word, detail = told
    if outcome is None and any(now - beat.alive < FRESH_SECONDS for beat in beats.values()):
        return _phase(beats, "its launcher is gone" if word == "vanished" else "")
    message = first_line(str(outcome["message"])) if outcome else ""
    result = str(outcome["outcome"]) if outcome else ""
    if word == "pending":
        return "pending", detail
    if word == "running":
        if result == Outcome.FINISHED.value:
            return "finishing", "the last checkpoint is verified, figures and export are made"
        if outcome is not None:
            return "restarting", f"{result}: {message}"
        quiet = min((now - beat.alive for beat in beats.values()), default=None)
        if quiet is None:
            return "starting", detail
        return "running", f"its ranks gave no sign of life for {quiet:.0f} s"
    if outcome is not None:
        if Outcome(result) in NEVER or outcome.get("asked"):
            return result, message
        if word in ("vanished", "unknown"):
            return {"vanished": "lost"}.get(word, word), f"{detail}; the last attempt: {result}, {message}"
        return result, message
    if word in ("vanished", "unknown"):
        return {"vanished": "lost"}.get(word, word), detail
    if word == "ended":
        return ("lost", "its ranks were killed") if beats else ("failed", detail)
    return (
        ("lost", "its ranks were killed, and nobody is left who would say so") if started else ("new", "never started")
    )


def _phase(beats: Mapping[int, Beat], note: str) -> tuple[str, str]:
    first = beats[min(beats)]
    signal = next((beat.signal for beat in beats.values() if beat.signal), "")
    parts = [f"{signal} came: saves and ends" if signal else "", note]
    starting = first.step == 0 and first.phase in ("start-up", "data preparation", "model", "restore", "model check")
    return ("starting" if starting else "running"), "; ".join(filter(None, [first.phase if starting else "", *parts]))


def stamp(row: Mapping[str, Any]) -> str:
    """What tells that a run's folder has changed: a new handle, attempt, outcome or end of a launcher all do."""
    folder = str(row["folder"])
    return _stamp_of(folder, int(row["attempts"]))


def _stamp(folder: Path) -> str:
    numbers = evidence.attempts(folder)
    return _stamp_of(str(folder), numbers[-1] if numbers else 0)


def _stamp_of(folder: str, number: int) -> str:
    return "/".join(_time(folder + inner) for inner in ("", "/logs", f"/logs/{number}", "/metrics.jsonl"))


def _time(path: str) -> str:
    try:
        return str(os.stat(path).st_mtime_ns)
    except OSError:
        return "-"


def configured(folder: Path) -> int | None:
    """The steps of the whole run as its configuration says, where it says steps; None too where somebody removes it just now."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return None
    length = re.search(r"^ +length: (\d+) steps$", text, re.M)
    return int(length[1]) if length else None


def lineage(run: Mapping[str, Any], resumed: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Where a run comes from: `run.json`, and the checkpoint that the newest attempt went on from."""
    told = run.get("lineage") or {}
    return {
        "resumed_from": f"step {resumed[-1].get('step')}" if resumed else None,
        "branched_from": f"{told['run']}/{told.get('checkpoint')}" if told.get("run") else None,
        "member_of": told.get("member_of"),
        "distilled_from": told.get("distilled_from"),
    }


def _records(folder: Path, numbers: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for number in numbers:
        record = evidence.record(folder / "logs" / str(number) / attempt.FILE)
        if record is not None:
            keys = ("outcome", "message", "seconds", "step", "checkpoint")
            found.append({"number": number, "ended": record.get("time"), **{key: record.get(key) for key in keys}})
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
