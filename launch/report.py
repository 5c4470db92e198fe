"""Why a run stopped, or what it is doing: everything that its folder tells, as JSON values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from launch import attempt, evidence, handles, process
from launch.culprit import Culprit, culprit, first_line
from trainer.checkpoint import manifest as manifests
from trainer.guard import heartbeat
from trainer.guard.heartbeat import Beat
from trainer.outcome import Outcome, RunError

FRESH_SECONDS = 10.0


def report(folder: Path, runs: Path, number: int | None = None, now: float | None = None) -> dict[str, Any]:
    """The report on an attempt (the newest if none is given).

    Raises:
        RunError: there is no such attempt.
    """
    known, now = evidence.attempts(folder), time.time() if now is None else now
    if not known or (number is not None and number not in known):
        what = f"run {folder.name} has no attempt {number}" if known else f"run {folder.name} was never started"
        mend = (
            f"attempts: {', '.join(map(str, known))}"
            if known
            else f"orthogon resume {process.reference(folder.name, runs)}"
        )
        raise RunError(what, where=str(folder / "logs"), mend=mend)
    number = known[-1] if number is None else number
    logs = folder / "logs" / str(number)
    beats, newest = heartbeat.read_all(logs), evidence.newest_checkpoint(folder)
    outcome, step = judged(logs, beats, now), reached(folder, beats, number == known[-1])
    running = outcome["outcome"] == "running"
    hangs, deaths = evidence.hangs(logs), evidence.deaths(logs)
    first = culprit(outcome, beats, hangs, deaths) if outcome["outcome"] not in ("running", "unknown") else None
    if number != known[-1]:
        newest = _saved(logs, newest)
    return {
        "run": folder.name,
        "attempt": number,
        "outcome": outcome["outcome"],
        "exit_code": outcome.get("exit_code"),
        "message": outcome["message"],
        "first": {"rank": first.rank, "what": first.what, "phase": _phase(beats, first)} if first else None,
        "step": step,
        "checkpoint": manifests.name(newest) if newest is not None else None,
        "lost_steps": max(0, step - (newest or 0)),
        "ranks": [rank_facts(rank, beat, now) for rank, beat in beats.items()],
        "evidence": shown(logs, outcome, first, hangs, deaths),
        "attempts": [_row(folder, one, now) for one in known],
        "next": None if running else go_on(outcome, process.reference(folder.name, runs), logs),
    }  # fmt: skip


def judged(logs: Path, beats: dict[int, Beat], now: float) -> dict[str, Any]:
    """The record of an attempt; `running` while its ranks live, `unknown` where nothing tells."""
    record = evidence.record(logs / attempt.FILE)
    if record is not None:
        return record
    told = evidence.told(logs)
    if told is not None:
        return told
    if any(now - beat.alive < FRESH_SECONDS for beat in beats.values()):
        return {"outcome": "running", "message": "its ranks give signs of life"}
    if not beats and not evidence.hangs(logs) and not evidence.deaths(logs):
        return {"outcome": "unknown", "message": "no rank has left a sign yet"}
    return attempt.silent(logs, asked=False, checkpoint=0)


def reached(folder: Path, beats: dict[int, Beat], newest: bool) -> int:
    """The last step that was done: as the heartbeats tell, else for the newest attempt as the history does."""
    done = max((beat.step for beat in beats.values()), default=0)
    if done or not newest:
        return done
    from trainer.metrics import history  # 0.2 s

    records = history.read(folder / "metrics.jsonl")
    return int(records[-1]["step"]) if records else 0


def shown(
    logs: Path,
    outcome: dict[str, Any],
    first: Culprit | None,
    hangs: dict[int, dict[str, Any]],
    deaths: list[evidence.Death],
) -> list[str]:
    """What the judgement rests on, as lines."""
    lines = []
    for death in sorted(deaths, key=lambda one: not one.first):
        end = death.signal or (f"signal {-death.code}" if death.code < 0 else f"exit code {death.code}")
        who = "srun" if (logs / "srun.log").exists() else "torchrun"
        lines.append(f"{who}: rank {death.rank} left with {end}" + (", first on its node" if death.first else ""))
    for number, note in hangs.items():
        where = "waiting in a collective" if note.get("waiting") else f"at {note.get('frame') or 'an unknown place'}"
        lines.append(
            f"rank {number}'s watchdog: {note.get('why')} for {float(note.get('seconds') or 0):.0f} s in phase "
            f"'{note.get('phase')}', {where}"
        )
    if outcome.get("ended"):
        lines.append(f"the launcher ended torchrun: {outcome['ended']}")
    following = logs.parent / str(int(logs.name) + 1)
    unreached = (evidence.record(following / "plan.json") or {}).get("unreached") or []
    for host in unreached:
        lines.append(f"attempt {following.name} began without node {host}: it lived and was not reached")
    rank = first.rank if first else None
    if rank is not None:
        log = logs / f"rank-{rank}.log"
        trace = evidence.traceback_of(log)
        lines += [f"{log}:", *(f"  {line}" for line in (trace.splitlines() or evidence.last_lines(log)))]
    return lines


def go_on(outcome: dict[str, Any], name: str, logs: Path) -> str | None:
    """The command that continues, or None where there is nothing to continue."""
    word = outcome["outcome"]
    resume = handles.resume_command(handles.read(logs.parents[1]), name)
    plan = evidence.record(logs / "plan.json")
    if plan is not None:
        resume = f"orthogon node {name} --hosts={','.join(plan['members'])} --host=..., on each of the nodes"
    table: dict[str, str | None] = {
        Outcome.FINISHED.value: None,
        Outcome.DIVERGED.value: f"orthogon branch {name} --name NEW --optim.lr=LOWER",
        Outcome.OUT_OF_DATA.value: f"{resume} --data.max_epochs=MORE",
        Outcome.NO_SPACE.value: f"make room, then {resume}",
        Outcome.BAD_CONFIGURATION.value: f"mend it, then {resume}",
        Outcome.BUG.value: f"mend it, then {resume}",
    }
    return table.get(word, resume)


def _phase(beats: dict[int, Beat], first: Culprit) -> str:
    beat = beats.get(first.rank) if first.rank is not None else None
    return f"{beat.phase}, after step {beat.step}" if beat else "unknown"


def rank_facts(rank: int, beat: Beat, now: float) -> dict[str, Any]:
    """What a rank does, as JSON values."""
    return {
        "rank": rank, "host": beat.host, "phase": beat.phase, "step": beat.step, "signal": beat.signal,
        "phase_seconds": round(max(0.0, now - beat.since), 1), "silent_seconds": round(max(0.0, now - beat.alive), 1),
    }  # fmt: skip


def _saved(logs: Path, newest: int | None) -> int | None:
    record = evidence.record(logs / attempt.FILE)
    return (record["checkpoint"] or None) if record else newest


def _row(folder: Path, number: int, now: float) -> dict[str, Any]:
    logs = folder / "logs" / str(number)
    beats = heartbeat.read_all(logs)
    record = judged(logs, beats, now)
    return {
        "attempt": number, "outcome": record["outcome"], "message": first_line(record["message"]),
        "step": record.get("step") or max((beat.step for beat in beats.values()), default=None),
        "checkpoint": record.get("checkpoint"), "seconds": record.get("seconds"),
    }  # fmt: skip
