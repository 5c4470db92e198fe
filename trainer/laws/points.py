"""The table that laws are fitted to: a CSV file with a header, or a JSON list of objects, one point each.

    k,n,d,loss,recipe,run,seed
    1,0.3,0.2097,3.58,joint,member-0,0

`loss` and at least one of the axes `k` (members of an ensemble), `n` (parameters), `d` (tokens) are needed. Points of
one `recipe` are fitted together; an axis that a recipe leaves empty is none of its axes. `run` and `seed` are labels:
points that agree in everything else are repeats. Plain numbers are taken as they stand, in a unit of the table's own;
numbers with a suffix (`300M`, `1.4B`) are read in billions, and a column has either the one or the other.
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.outcome import RunError
from trainer.yaml_source import nearest

AXES = ("k", "n", "d")
"""In the order in which limits are taken: K inside N inside D."""
COLUMNS = (*AXES, "loss", "recipe", "run", "seed")
SUFFIXES = {"k": 1e-6, "m": 1e-3, "b": 1.0, "t": 1e3}
GAP = 1e5
"""Neighbouring values of a column that lie further apart than this factor are in different units."""


@dataclass(frozen=True)
class Point:
    """One measured loss."""

    coords: dict[str, float]
    """Its place on the axes that it has."""
    loss: float
    where: str
    """`file:line`, or the number in a JSON list."""
    recipe: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> dict[str, list[Point]]:
    """The points of each recipe, in the order of the file.

    Raises:
        RunError: the file or a value in it is not right; the sentence names line and column.
    """
    rows = _rows(path)
    if not rows:
        raise RunError("the table has no points", where=str(path), mend="add lines below the header")
    for where, row in rows[:1] if path.suffix != ".json" else rows:
        _check_columns(row, where)
    _check_units(rows)
    found: dict[str, list[Point]] = {}
    for where, row in rows:
        point = _point(row, where)
        found.setdefault(point.recipe, []).append(point)
    for recipe, points in found.items():
        _check_axes(recipe, points)
    return found


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Where each point stands, and its cells as text; empty cells are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the table cannot be read: {error}", where=str(path), mend="check the path") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise RunError(f"no valid JSON: {error}", where=str(path), mend="correct the line") from None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise RunError("the table is no list of objects", where=str(path), mend='write [{"n": 0.3, "loss": 3.6}]')
        return [
            (f"{path}, point {number}", {key: str(cell) for key, cell in value.items() if cell not in (None, "")})
            for number, value in enumerate(values, 1)
        ]
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    _check_columns(dict.fromkeys(reader.fieldnames or []), f"{path}:1")
    rows = []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            count = len(reader.fieldnames or [])
            raise RunError(f"the line has not {count} cells, as the header", where=where, mend="add or remove commas")
        rows.append((where, {key: cell.strip() for key, cell in row.items() if cell.strip()}))
    return rows


def _check_columns(row: dict[str, Any], where: str) -> None:
    for column in row:
        if column not in COLUMNS:
            guess = nearest(str(column).lower(), list(COLUMNS))
            mend = f"did you mean {guess}?" if guess else f"columns: {', '.join(COLUMNS)}"
            raise RunError(f"unknown column {column}", where=where, mend=mend)


def _check_units(rows: list[tuple[str, dict[str, str]]]) -> None:
    """One unit in each column."""
    for axis in AXES:
        cells = [(where, row[axis]) for where, row in rows if axis in row]
        with_suffix = [(where, cell) for where, cell in cells if cell[-1].lower() in SUFFIXES]
        plain = [(where, cell) for where, cell in cells if (where, cell) not in with_suffix]
        if with_suffix and plain:
            raise RunError(
                f"mixed units: '{with_suffix[0][1]}' in {with_suffix[0][0]} has a suffix and '{plain[0][1]}' has none",
                where=f"{plain[0][0]}, column {axis}", mend="give all values of the column a suffix, or none",
            )  # fmt: skip
        values = sorted((_number(cell, where, axis), where) for where, cell in cells)
        for (below, one), (above, other) in pairwise(values):
            if above > GAP * below:
                raise RunError(
                    f"mixed units: {above:g}, and {below:g} in {one}, with nothing between",
                    where=f"{other}, column {axis}", mend="write all values in one unit",
                )  # fmt: skip


def _number(cell: str, where: str, column: str) -> float:
    match = re.fullmatch(r"([^kKmMbBtT]+)([kKmMbBtT]?)", cell)
    try:
        value = float(match[1] if match else cell) * (SUFFIXES[match[2].lower()] if match and match[2] else 1.0)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RunError(
            f"{column} = {cell} is no number above zero", where=f"{where}, column {column}",
            mend="a run that diverged has no loss: leave its line out" if column == "loss" else "correct it, or leave it empty",
        )  # fmt: skip
    if column == "k" and value != round(value):
        raise RunError(
            f"k = {cell} is no whole number",
            where=f"{where}, column k",
            mend="k is the number of members of an ensemble",
        )
    return value


def _point(row: dict[str, str], where: str) -> Point:
    if "loss" not in row:
        raise RunError("the point has no loss", where=f"{where}, column loss", mend="add it, or leave the line out")
    coords = {axis: _number(row[axis], where, axis) for axis in AXES if axis in row}
    if not coords:
        raise RunError("the point has none of k, n, d", where=where, mend="say what the loss is to follow from")
    labels: dict[str, str] = {key: row[key] for key in ("run", "seed") if key in row}
    return Point(coords, _number(row["loss"], where, "loss"), where, row.get("recipe", ""), labels)


def _check_axes(recipe: str, points: list[Point]) -> None:
    first = points[0]
    for point in points:
        for axis in AXES:
            if (axis in point.coords) != (axis in first.coords):
                missing, there = (point, first) if axis in first.coords else (first, point)
                name = f" of recipe {recipe}" if recipe else ""
                raise RunError(
                    f"a point{name} has no {axis}, another one has ({there.where})",
                    where=f"{missing.where}, column {axis}", mend=f"give all of them {axis}, or none",
                )  # fmt: skip
