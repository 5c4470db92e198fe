"""The verb diff: what two runs differ in, and from which record on."""

from __future__ import annotations

import json as json_format
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch import process
from launch.verbs.options import Json, Runs
from trainer import runfolder
from trainer.metrics import history

NAMES = ("name", "runs")
ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two runs: configuration, environment, metrics, the first record that differs."""

    OVERRIDES: ClassVar[bool] = False
    first: Annotated[Positional[str], arg(metavar="RUN")]
    """The first run's name."""
    second: Annotated[Positional[str], arg(metavar="RUN")]
    """The second run's name."""
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folders = [process.run_folder(name, self.runs) for name in (self.first, self.second)]
        found = compare(*folders)
        if self.json:
            print(json_format.dumps(found))
        else:
            show(found)
        return 0


def compare(first: Path, second: Path) -> dict[str, Any]:
    """All differences of two runs, as JSON values; pairs are (first, second)."""
    from trainer import config as configuration

    a, b = (configuration.resolved(runfolder.open_run(folder)) for folder in (first, second))
    config = {key: list(pair) for key, pair in configuration.changes(a, b).items() if key not in NAMES}
    facts = [environment(folder) for folder in (first, second)]
    records = [history.read(folder / "metrics.jsonl") for folder in (first, second)]
    return {
        "runs": [first.name, second.name],
        "config": config,
        "environment": {key: list(pair) for key, pair in configuration.changes(*facts).items()},
        "steps": [rows[-1]["step"] if rows else 0 for rows in records],
        "metrics": common(*records),
        "first_difference": first_difference(*records),
    }


def environment(folder: Path) -> dict[str, Any]:
    """What a run ran with: versions, commit, command, the latest identity of its data, where it came from."""
    record = runfolder.read_record(folder)
    facts = {key: record.get(key) for key in ("git_commit", "python", "versions", "lineage")}
    facts["command"] = shlex.join(record.get("command", []))
    for event in runfolder.events(folder):
        if event["event"] == "data":
            facts["data"] = {key: value for key, value in event.items() if key not in ("time", "event", "table")}
    return facts


def common(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and validation bits per byte at up to `ROWS` steps that both runs have, the last one among them.

    These are steps at which both were validated; where those are few, others lie between them.
    """
    rows = [by_step(records) for records in (first, second)]
    steps = sorted(rows[0].keys() & rows[1].keys())
    validated = [s for s in steps if all("validation_bits_per_byte" in side[s] for side in rows)]
    chosen = set(_spread(validated, ROWS - 1)) | set(steps[-1:])
    if len(chosen) < ROWS // 2:
        chosen |= set(_spread([s for s in steps if s not in chosen], ROWS - len(chosen)))
    keys = ("loss", "validation_bits_per_byte")
    return [{"step": s, **{key: [side[s].get(key) for side in rows] for key in keys}} for s in sorted(chosen)]


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, the last one among them."""
    count = min(count, len(steps))
    return [steps[round((i + 1) * len(steps) / count) - 1] for i in range(count)]


def by_step(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The training and the validation record of each step as one."""
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        merged.setdefault(record["step"], {}).update(record)
    return merged


def first_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first step of both runs whose records differ in anything but the timings; None if all common ones are equal.

    A NaN equals a NaN here: it says the same.
    """
    rows = [by_step([history.lasting(record) for record in records]) for records in (first, second)]
    steps = sorted(rows[0].keys() & rows[1].keys())
    for number, step in enumerate(steps):
        a, b = rows[0][step], rows[1][step]
        keys = [key for key in a.keys() | b.keys() if not _same(a.get(key), b.get(key))]
        if keys:
            order = list(a) + list(b)
            return {
                "step": step,
                "equal_before": number,
                "values": {key: [a.get(key), b.get(key)] for key in sorted(keys, key=order.index)},
            }
    return None


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def show(found: dict[str, Any]) -> None:
    """Print the comparison for people."""
    first, second = found["runs"]
    for title, key in (("configuration", "config"), ("environment", "environment")):
        print(f"{title}{'' if found[key] else ': equal'}")
        _show_pairs(found[key])
    print(f"steps: {found['steps'][0]:,} in {first}, {found['steps'][1]:,} in {second}")
    if found["metrics"]:
        wide = max(12, len(first), len(second))
        print(f"\n{'':>8}  {'loss':^{2 * wide + 14}}  {'validation bits per byte':^{2 * wide + 14}}")
        heads = f"{first:>{wide}}  {second:>{wide}}  {'difference':>10}"
        print(f"{'step':>8}  {heads}  {heads}")
        for row in found["metrics"]:
            cells = [_cells(row[key], wide) for key in ("loss", "validation_bits_per_byte")]
            print(f"{row['step']:>8,}  {cells[0]}  {cells[1]}".rstrip())
    difference = found["first_difference"]
    if not found["metrics"]:
        print("no step is in both histories")
    elif difference is None:
        print("\nall records of common steps are equal (timings left out)")
    else:
        before = difference["equal_before"]
        equal = f"{before:,} common steps before it are equal" if before else "the first that both have"
        print(f"\nfirst difference: step {difference['step']:,}, {equal} (timings left out)")
        _show_pairs(difference["values"])


def _cells(pair: list[float | None], wide: int) -> str:
    a, b = (f"{value:.5f}" if value is not None else "-" for value in pair)
    both = pair[0] is not None and pair[1] is not None
    return f"{a:>{wide}}  {b:>{wide}}  {f'{pair[1] - pair[0]:+.5f}' if both else '-':>10}"  # type: ignore[operator]


def _show_pairs(pairs: dict[str, list[Any]]) -> None:
    """A line per key, or one more per value where they are long."""
    width = max([0, *map(len, pairs)])
    for key, pair in pairs.items():
        a, b = map(_text, pair)
        if len(a) + len(b) <= 100 - width:
            print(f"  {key:{width}}  {a}  ->  {b}")
        else:
            print(f"  {key}\n    {a}\n    {b}")


def _text(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value):
        return value[:12]  # a digest
    return "(none)" if value is None else json_format.dumps(value) if isinstance(value, list) else str(value)
