"""The verb list. It starts in a blink, also with a thousand runs: nothing is imported that a plain answer does not need."""

from __future__ import annotations

import json as json_format
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launch import ledger
from launch.standing import ALIVE

COLUMNS = ("run", "state", "step", "loss", "tokens/s", "attempts", "backend", "age", "note")
RIGHT = ("step", "loss", "tokens/s", "attempts", "age")
EVERY_SECONDS = 2.0
COLOURS = {
    "running": "green", "finished": "green", "finishing": "green", "starting": "cyan", "pending": "cyan", "restarting": "yellow",
    "preempted": "yellow", "new": "dim", "gone": "dim", "unknown": "magenta",
}  # fmt: skip
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36, "dim": 2}


@dataclass(frozen=True, kw_only=True)
class List:
    """List the runs: state, progress, loss, speed, attempts.

    The runs are those of the ledger, wherever their folders lie; their states are asked for anew.
    """

    OVERRIDES: ClassVar[bool] = False
    watch: bool = False
    """Go on, on a screen of its own, until Ctrl-C."""
    rebuild: bool = False
    """Read the ledger anew from the run folders: those in --runs, and those beside the runs that are known."""
    json: bool = False
    """Print JSON, for programs."""
    runs: Path = Path("runs")
    """The folder of the run folders that --rebuild reads."""

    @classmethod
    def quick(cls, arguments: Sequence[str]) -> List | None:
        """The verb from a command line that is as simple as most are; None leaves it to the full parser (0.1 s)."""
        chosen, words = dict[str, Any](), list(arguments)
        while words:
            word = words.pop(0)
            if word in ("--watch", "--rebuild", "--json"):
                chosen[word[2:]] = True
            elif word.startswith("--runs="):
                chosen["runs"] = Path(word.removeprefix("--runs="))
            elif word == "--runs" and words:
                chosen["runs"] = Path(words.pop(0))
            else:
                return None
        return cls(**chosen)

    def __call__(self, overrides: list[str]) -> int:
        if self.rebuild:
            count = ledger.rebuild(self.runs)
            print(f"{count} runs are read from their folders", file=sys.stderr)
        if self.watch:
            return _watch()
        found = ledger.refreshed()
        if self.json:
            print(json_format.dumps(found))
        elif not found:
            print("no runs are known; `orthogon list --rebuild --runs=FOLDER` looks for some")
        else:
            print(plain(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
        return 0


def plain(found: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The table as lines; for a terminal of some width with colours and cut to it. rich would take 0.3 s for 200 runs."""
    now = time.time()
    rows = [COLUMNS, *(_cells(row, now) for row in found)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(COLUMNS))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(size) if name in RIGHT else cell.ljust(size)
            for name, cell, size in zip(COLUMNS, row, widths, strict=True)
        ]
        if width is not None:
            room = width - sum(widths[:-1]) - 2 * len(widths[:-1])
            cells[-1] = cells[-1][: max(0, room)]
            cells[1] = (
                f"\x1b[{_COLOURS[COLOURS.get(found[number - 1]['state'], 'red')]}m{cells[1]}\x1b[0m"
                if number
                else cells[1]
            )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _watch() -> int:
    from rich.live import Live

    try:
        with Live(_table(ledger.refreshed()), screen=sys.stdout.isatty(), auto_refresh=False) as live:
            while True:
                live.update(_table(ledger.refreshed()), refresh=True)
                time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        return 0


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table, now = Table(box=box.SIMPLE_HEAD, pad_edge=False), time.time()
    room = shutil.get_terminal_size().lines - 4
    rows = sorted(rows, key=lambda row: row["state"] not in ALIVE)[: max(1, room)]  # what moves first
    for name in COLUMNS:
        table.add_column(
            name, justify="right" if name in RIGHT else "left", no_wrap=name != "note", overflow="fold",
        )  # fmt: skip
    for row in rows:
        cells = [Text(cell) for cell in _cells(row, now)]
        cells[1].stylize(COLOURS.get(row["state"], "red"))
        table.add_row(*cells)
    return table


def _cells(row: dict[str, Any], now: float) -> list[str]:
    progress = f"{row['step']:,}" + (f"/{row['steps']:,}" if row["steps"] else "")
    return [
        row["name"], row["state"], progress, "-" if row["loss"] is None else f"{row['loss']:.4f}",
        "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}", str(row["attempts"]), row["backend"],
        "-" if row["created"] is None else age(now - row["created"]), row["note"],
    ]  # fmt: skip


def age(seconds: float) -> str:
    """Some time in two figures: 40 s, 12 min, 3 h, 5 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
