"""Tools inside warm ranks. Imported by spawned processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import runfolder
from trainer.evaluate.task import evaluate as evaluated
from trainer.outcome import RunError


def evaluate(
    folder: str, tasks: list[str], overrides: list[str], step: int | None = None, export: str | None = None
) -> dict[str, Any]:
    """What `orthogon evaluate` finds; an orderly error as its text."""
    try:
        config = runfolder.open_run(Path(folder), overrides)
        source = Path(export) if export is not None else None
        return evaluated(Path(folder), config, step, source, [Path(task) for task in tasks])
    except RunError as error:
        return {"error": str(error)}
