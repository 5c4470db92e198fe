"""All that can be said of a run that may still be going on, as JSON values, and for people."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from launch import evidence, handles, report, standing
from launch.culprit import first_line
from launch.verbs.listing import age
from trainer.guard import heartbeat

EVENTS = 5
RECENT = 20
"""Steps whose times tell how long the rest will take."""


def status(folder: Path, reference: str, now: float | None = None) -> dict[str, Any]:
    """How a run stands.

    Args:
        reference: how a command names the run.
    """
    now = time.time() if now is None else now
    found = standing.read(folder)
    handle = handles.read(folder)
    history = evidence.last_records(folder / "metrics.jsonl", '"loss":', RECENT)
    validations = evidence.last_records(folder / "metrics.jsonl", '"validation_loss":', 1)
    beats = heartbeat.read_all(folder / "logs" / str(found.attempts)) if found.attempts else {}
    newest = evidence.newest_checkpoint(folder)
    left = remaining(found.step, found.steps, history) if found.state in ("running", "starting") else None
    facts: dict[str, Any] = {
        "run": found.name, "folder": found.folder, "state": found.state, "note": found.note, "backend": found.backend,
        "handle": handle, "step": found.step, "steps": found.steps, "loss": found.loss,
        "tokens_per_second": found.tokens_per_second, "seconds_left": left, "checkpoint": newest, "created": found.created,
        "age_seconds": None if found.created is None else round(now - found.created, 1),
        "validation": validations[0] if validations else None,
        "ranks": [report.rank_facts(rank, beat, now) for rank, beat in beats.items()] if found.alive else [],
        "events": evidence.last_records(folder / "events.jsonl", count=EVENTS), "attempts": found.records, "lineage": found.lineage,
    }  # fmt: skip
    return facts | {"next": following(facts, reference)}


def remaining(step: int, steps: int | None, history: list[dict[str, Any]]) -> float | None:
    """Seconds until the last step, from the wall times of the last steps; None where nothing tells."""
    seconds = [record["seconds"] for record in history if "seconds" in record]
    if steps is None or not seconds or step > steps:
        return None
    return round(statistics.fmean(seconds) * (steps - step), 1)


def following(facts: dict[str, Any], reference: str) -> str | None:
    """The command to go on with."""
    if facts["state"] in standing.ALIVE:
        return f"orthogon logs {reference} -f"
    if facts["state"] in ("finished", "unknown"):
        return None
    why = "" if facts["state"] in ("new", "preempted") else f"orthogon report {reference}; then "
    return why + handles.resume_command(facts["handle"], reference)


def show(facts: dict[str, Any]) -> str:
    """The same for people."""
    note = f": {facts['note']}" if facts["note"] else ""
    lines = [f"run {facts['run']}: {facts['state']}{note}"]
    of = f" of {facts['steps']:,}" if facts["steps"] else ""
    share = f" ({facts['step'] / facts['steps']:.1%})" if facts["steps"] else ""
    progress = f"step {facts['step']:,}{of}{share}"
    if facts["loss"] is not None:
        progress += f", loss {facts['loss']:.4f}"
    if facts["tokens_per_second"] is not None:
        progress += f", {facts['tokens_per_second']:,.0f} tokens/s"
    if facts["seconds_left"] is not None:
        progress += f", {age(facts['seconds_left'])} left"
    lines.append(progress)
    if facts["validation"]:
        one = facts["validation"]
        bits = one.get("validation_bits_per_byte")
        lines.append(
            f"last validation: loss {one['validation_loss']:.4f}"
            + (f", {bits:.4f} bits per byte" if bits is not None else "")
            + f" at step {one['step']:,}"
        )
    saved = "none" if facts["checkpoint"] is None else f"step {facts['checkpoint']:,}"
    began = "" if facts["age_seconds"] is None else f"; made {age(facts['age_seconds'])} ago"
    lines.append(f"newest checkpoint: {saved}; backend: {facts['backend']}; folder: {facts['folder']}{began}")
    lines += [f"{key.replace('_', ' ')}: {value}" for key, value in facts["lineage"].items() if value]
    if facts["ranks"]:
        lines.append(f"\n{'rank':>4}  {'phase':20}  {'step':>9}  {'in phase for':>12}  {'last sign of life':>17}  host")
        for one in facts["ranks"]:
            silent = f"{one['silent_seconds']:.1f} s ago"
            lines.append(
                f"{one['rank']:>4}  {one['phase']:20}  {one['step']:>9,}  {one['phase_seconds']:>10.0f} s  {silent:>17}  {one['host']}"
            )
    if facts["attempts"]:
        lines.append(f"\n{'attempt':>7}  {'outcome':17}  {'checkpoint':>10}  {'seconds':>9}  message")
        for one in facts["attempts"]:
            cells = [f"{one[key]:,}" if one[key] is not None else "-" for key in ("checkpoint", "seconds")]
            message = first_line(str(one["message"]))
            lines.append(f"{one['number']:>7}  {one['outcome']:17}  {cells[0]:>10}  {cells[1]:>9}  {message}")
    if facts["events"]:
        lines.append("\nlast events")
        for event in facts["events"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
            rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "tables"))
            lines.append(f"  {when}  {event.get('event')}  {rest[:100]}")
    if facts["next"]:
        lines.append(f"\ngo on with: {facts['next']}")
    return "\n".join(lines)
