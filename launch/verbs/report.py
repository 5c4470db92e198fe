"""The verb report."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launch import process
from launch.verbs.options import Json, RunName, Runs


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tell why a run stopped: class of failure, first rank and its phase, evidence, the command to go on.

    A run that is still alive is reported with the phase of each rank. Only files are read.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    attempt: int | None = None
    """The attempt; none takes the newest."""
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.report import report

        found = report(process.run_folder(self.run, self.runs), self.runs, self.attempt)
        if self.json:
            print(json_format.dumps(found))
        else:
            show(found)
        return 0


def show(found: dict[str, Any]) -> None:
    """Print a report for people."""
    code = f" ({found['exit_code']})" if found["exit_code"] is not None else ""
    print(f"run {found['run']}, attempt {found['attempt']}: {found['outcome']}{code}\n{found['message']}")
    running, first = found["outcome"] == "running", found["first"]
    if first is not None:
        print(f"first: {first['what']}" + (f"; phase: {first['phase']}" if first["rank"] is not None else ""))
    elif found["outcome"] in ("infrastructure", "bug", "unknown"):
        print("first: unknown")
    checkpoint = found["checkpoint"] or "none"
    lost = "" if running else f"; {found['lost_steps']} step{'s are' if found['lost_steps'] != 1 else ' is'} lost"
    print(f"step {found['step']:,} was reached; newest checkpoint: {checkpoint}{lost}")
    if found["ranks"]:
        print(f"\n{'rank':>4}  {'phase':20}  {'step':>9}  {'signal':8}  {'in phase for':>12}  last sign of life  host")
    for one in found["ranks"]:
        seconds = f"{one['phase_seconds']:.0f} s"
        print(
            f"{one['rank']:>4}  {one['phase']:20}  {one['step']:>9,}  {one['signal']:8}  {seconds:>12}  "
            f"{one['silent_seconds']:>10.1f} s ago  {one['host']}"
        )
    if found["evidence"]:
        print("\n" + "\n".join(found["evidence"]))
    print(f"\n{'attempt':>7}  {'outcome':17}  {'step':>9}  {'checkpoint':>10}  {'seconds':>9}  message")
    for row in found["attempts"]:
        cells = [f"{row[key]:,}" if row[key] is not None else "-" for key in ("step", "checkpoint", "seconds")]
        print(
            f"{row['attempt']:>7}  {row['outcome']:17}  {cells[0]:>9}  {cells[1]:>10}  {cells[2]:>9}  {row['message'][:100]}"
        )
    if found["next"]:
        print(f"\ngo on with: {found['next']}")
