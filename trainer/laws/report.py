"""Fit a table of points, and say what came out: as JSON values, as lines for people, as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.laws import points as tables
from trainer.laws.efficiency import Efficiency, efficiencies
from trainer.laws.nested import NAMES, Law, Limits, limits


def fit(
    path: Path, *, noise: float | None, draws: int, seed: int, baseline: str | None, figure: Path | None, as_json: bool
) -> None:
    """Fit every recipe of a table and print the laws; see `trainer/laws/points.py` for the table.

    Raises:
        RunError: the table is not right, has too few points, or there is no such baseline.
    """
    recipes = tables.read(path)
    fits = {
        recipe: limits(points, noise=noise, draws=draws, seed=seed + number)
        for number, (recipe, points) in enumerate(recipes.items())
    }
    gains = efficiencies(recipes, fits, baseline) if baseline is not None else []
    if figure is not None:
        from trainer.laws.figure import laws_figure

        laws_figure(fits, figure, path.name)
    if as_json:
        laws = [record for recipe, found in fits.items() for record in laws_of(recipe, recipes[recipe], found)]
        noises = {recipe: {"noise": found.noise, "degrees": found.degrees} for recipe, found in fits.items()}
        answer = {"laws": laws, "noise": noises, "baseline": baseline, "efficiency": [vars(one) for one in gains]}
        print(json.dumps(_finite(answer)))
        return
    for line in [*law_lines(fits), *(efficiency_lines(gains, baseline) if baseline is not None else [])]:
        print(line)
    if figure is not None:
        print(f"drawn in {figure}")


def laws_of(recipe: str, points: list[tables.Point], found: Limits) -> list[dict[str, Any]]:
    """The laws of a recipe as JSON values. Those of the first axis tell the labels of their points."""
    records = []
    for number, stage in enumerate(found.stages):
        for law in stage.laws:
            own = [p for p in points if all(p.coords[k] == v for k, v in law.at.items())] if number == 0 else []
            rows = zip(law.x, law.y, law.residuals, strict=True)
            records.append(
                {
                    "recipe": recipe,
                    "axis": law.axis,
                    "at": law.at,
                    **{name: getattr(law, name) for name in NAMES},
                    "intervals": {name: law.interval(name) for name in NAMES},
                    "trend_probability": law.trend,
                    "misfit_probability": law.misfit,
                    "flags": law.flags,
                    "points": [
                        {law.axis: float(x), "loss": float(y), "residual": float(r)} | (own[i].labels if own else {})
                        for i, (x, y, r) in enumerate(rows)
                    ],
                }
            )
    return records


def law_lines(fits: dict[str, Limits]) -> list[str]:
    """A table of all laws, with what they do not tell below it."""
    head = ("law", "points", "A", "B", "95% interval", "C (limit)", "95% interval", "largest residual")
    rows, notes = [], []
    for recipe, found in fits.items():
        for stage in found.stages:
            for law in stage.laws:
                name = title(recipe, law)
                rows.append(
                    (
                        name, str(len(law.x)), f"{law.a:.4g}", f"{law.b:.3f}", _interval(law.interval("b"), 3), f"{law.c:.4f}",
                        _interval(law.interval("c"), 4), f"{max(law.residuals, key=abs):+.4f}",
                    )
                )  # fmt: skip
                notes += [f"{name}: {flag}" for flag in law.flags]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    for recipe, found in fits.items():
        name = f"noise of a loss{f', {recipe}' if recipe else ''}: "
        if found.noise is not None:
            source = "as given" if found.degrees is None else f"from residuals, degrees of freedom: {found.degrees}"
            lines.append(f"{name}{found.noise:.2g} ({source})")
    return [*lines, *notes]


def efficiency_lines(gains: list[Efficiency], baseline: str | None) -> list[str]:
    """Ratios of extrapolated limits, each beside that of a loss that was seen."""
    lines = [f"data efficiency against {baseline}: how much more data its law asks for the same loss"]
    for one in gains:
        place = ", ".join(f"{axis} = {value:g}" for axis, value in one.observed_at.items())
        seen = f"observed {one.observed:.4f}{f' at {place}' if place else ''}: {_ratio(one.observed_ratio)}"
        if one.limit is not None and one.limit_ratio is not None:
            low, high = one.limit_interval or (None, None)
            interval = f" [{_ratio(low)}, {_ratio(high)}]" if low is not None and high is not None else ""
            seen += f"; extrapolated limit {one.limit:.4f}: {_ratio(one.limit_ratio)}{interval}"
        lines.append(f"{one.recipe or 'the others'}, d = {one.d:g}: {seen}")
    return lines


def title(recipe: str, law: Law) -> str:
    """A law's name for people: `joint, over k at n = 0.3`."""
    at = " at " + ", ".join(f"{axis} = {value:g}" for axis, value in law.at.items()) if law.at else ""
    return f"{recipe}, over {law.axis}{at}" if recipe else f"over {law.axis}{at}"


def _interval(pair: tuple[float, float] | None, digits: int) -> str:
    return f"[{pair[0]:.{digits}f}, {pair[1]:.{digits}f}]" if pair is not None else "unknown"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if math.isfinite(value) else "beyond any data"


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
