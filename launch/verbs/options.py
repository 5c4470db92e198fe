"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

RunName = Annotated[Positional[str], arg(metavar="RUN", help="The run's name.")]
Runs = Annotated[Path, arg(help="The folder of the run folders.")]
Step = Annotated[int | None, arg(help="The step of the checkpoint; none takes the newest.")]
Export = Annotated[Path | None, arg(help="Take the weights of this export instead of a checkpoint's.")]
Json = Annotated[bool, arg(help="Print JSON, for programs.")]


def weights(step: int | None, export: Path | None) -> list[str]:
    """`step` and `export` as options of a task."""
    return [*([f"--step={step}"] if step is not None else []), *([f"--export={export}"] if export is not None else [])]
