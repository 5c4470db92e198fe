"""The verbs of scaling laws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from launch import process
from launch.verbs.options import Json
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit scaling laws A/x^B + C over members, parameters and tokens, with intervals.

    The table is a CSV file with a header, or a JSON list, with the columns loss, k, n, d and, where wanted, recipe, run, seed.
    Limits are nested: k inside n inside d. What the points do not tell is told below the table. See docs/laws.md.
    """

    OVERRIDES: ClassVar[bool] = False
    table: Annotated[Positional[Path], arg(metavar="FILE")]
    """The table of points."""
    baseline: str | None = None
    """A recipe with a law over d: print the data efficiency of the others against it."""
    noise: float | None = None
    """Standard deviation of a loss over seeds, in nats; by default from the residuals."""
    draws: int = 1000
    """Refits in the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    figure: Annotated[Path | None, arg(metavar="PNG")] = None
    """Draw points, laws and bands into this file."""
    json: Json = False

    def __call__(self, overrides: list[str]) -> int:
        if self.noise is not None and not 0 < self.noise < float("inf"):
            raise RunError("the noise is not above zero", where="command line, --noise", mend="give nats, such as 0.01")
        if self.draws < 100:
            raise RunError(
                "an interval of 95% needs at least 100 draws", where="command line, --draws", mend="give 1000, or more"
            )
        if self.seed < 0:
            raise RunError("the seed is below zero", where="command line, --seed", mend="give 0 or more")
        chosen = [f"--draws={self.draws}", f"--seed={self.seed}", *(["--json"] if self.json else [])]
        chosen += [f"--baseline={self.baseline}"] if self.baseline is not None else []
        chosen += [f"--noise={self.noise}"] if self.noise is not None else []
        chosen += [f"--figure={self.figure}"] if self.figure is not None else []
        return process.task("laws", str(self.table), *chosen)
