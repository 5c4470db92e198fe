"""Search on a lattice of settings: coordinate descent with a certificate, or the whole grid. Pure; knows nothing of runs.

A point is locally optimal when none of its neighbours, one grid step along one axis, has a lower loss (Wen et al. 2025;
arXiv 2509.14786 tunes epochs, rate and weight decay so). The certificate says that every neighbour was looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

Point = tuple[float, ...]
"""A value on each axis."""
Evaluate = Callable[[Sequence[Point]], Mapping[Point, float]]
"""Losses of points: NaN for one that has none, no entry for one that was not tried, which ends the search."""


@dataclass(frozen=True)
class Axis:
    """Ascending values, which grow geometrically at both ends as far as the bounds.

    A zero stands below all other values and ends the axis. One value alone is held fixed.
    """

    name: str
    values: tuple[float, ...]
    least: float
    most: float

    def around(self, value: float) -> tuple[float | None, float | None]:
        """The values one step below and above; None at an end."""
        place = self.values.index(value)
        below = self.values[place - 1] if place else None
        return below, self.values[place + 1] if place + 1 < len(self.values) else None

    def grown(self, up: bool) -> Axis:
        """With one more value beyond an end, by the grid's own ratio; the same axis where there is no room.

        Ratios that alternate, as in 1, 3, 10, go on alternating.
        """
        positive = [value for value in self.values if value > 0]
        if len(positive) < 2 or (not up and self.values[0] == 0):
            return self
        last, before, *others = positive[::-1] if up else positive
        new = float(f"{before * last / others[0] if others else last * last / before:.6g}")
        if not self.least <= new <= self.most:
            return self
        return Axis(self.name, (*self.values, new) if up else (new, *self.values), self.least, self.most)


@dataclass(frozen=True)
class Neighbour:
    """One grid step from a point; without a point where the axis ends, which counts as looked at."""

    axis: str
    up: bool
    point: Point | None


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    point: Point
    """The best one."""
    axes: tuple[Axis, ...]
    """With the values that were added."""
    losses: Mapping[Point, float]
    """Of every point that was tried, in the order in which they were asked for."""
    neighbours: tuple[Neighbour, ...]
    missing: tuple[Point, ...]
    """Of the point and its neighbours, those without a loss."""
    moves: tuple[Point, ...]
    """From the start to the point."""
    complete: bool
    """Nothing that was asked for was left out."""

    @property
    def certified(self) -> bool:
        """The point and all its neighbours have losses, and none is better."""
        return self.complete and not self.missing


@dataclass
class _Search:
    axes: list[Axis]
    evaluate: Evaluate
    noise: float
    losses: dict[Point, float] = field(default_factory=dict)

    def ask(self, points: Sequence[Point]) -> bool:
        """Get the losses that are not there yet; whether all were tried."""
        wanted = [point for point in dict.fromkeys(points) if point not in self.losses]
        found = self.evaluate(wanted) if wanted else {}
        self.losses |= {point: found[point] for point in wanted if point in found}
        return all(point in self.losses for point in points)

    def loss(self, point: Point) -> float:
        """Infinite where there is none."""
        value = self.losses.get(point, math.inf)
        return math.inf if math.isnan(value) else value

    def neighbours(self, point: Point) -> list[Neighbour]:
        found = []
        for place, axis in enumerate(self.axes):
            for up, value in zip((False, True), axis.around(point[place]), strict=True):
                other = None if value is None else (*point[:place], value, *point[place + 1 :])
                found.append(Neighbour(axis.name, up, other))
        return found

    def best(self, points: Sequence[Point]) -> Point:
        """The lowest loss; of those within the noise of it the cheapest, whose value on the first axis is lowest."""
        lowest = min(self.loss(point) for point in points)
        level = [point for point in points if self.loss(point) <= lowest + 2 * self.noise]
        return min(level, key=lambda point: (point[0], self.loss(point)))

    def better(self, point: Point) -> Point | None:
        """The neighbour to move to; None where none is better by more than the noise."""
        around = [n.point for n in self.neighbours(point) if n.point is not None]
        winners = [other for other in around if self.loss(other) < self.loss(point) - 2 * self.noise]
        return self.best(winners) if winners else None

    def grow(self, point: Point) -> None:
        """Add a value beyond every end of an axis that the point lies on."""
        for place, axis in enumerate(self.axes):
            for up, value in zip((False, True), axis.around(point[place]), strict=True):
                if value is None:
                    self.axes[place] = self.axes[place].grown(up)

    def found(self, point: Point, moves: Sequence[Point], complete: bool) -> Found:
        around = self.neighbours(point)
        cross = [point, *(n.point for n in around if n.point is not None)]
        missing = [other for other in cross if not math.isfinite(self.loss(other))]
        return Found(point, tuple(self.axes), self.losses, tuple(around), tuple(missing), tuple(moves), complete)


def descend(axes: Sequence[Axis], start: Point, evaluate: Evaluate, noise: float = 0.0) -> Found:
    """Coordinate descent: look at the whole cross of a point, move to its best neighbour, until none is better.

    An axis grows where a point that would be the end of the search lies on an end of it.

    Args:
        start: a point of the lattice.
        evaluate: asked once for any point, for all that a cross lacks at the same time.
        noise: standard deviation of a loss; a neighbour is better only by more than twice as much.

    Returns:
        The point and its certificate. A point whose own loss is missing gives way to any that has one.
    """
    search, point, moves = _Search(list(axes), evaluate, noise), start, [start]
    while True:
        cross = [point, *(n.point for n in search.neighbours(point) if n.point is not None)]
        if not search.ask(cross):
            return search.found(point, moves, False)
        to = search.better(point)
        if to is None:
            before = list(search.axes)
            search.grow(point)
            if search.axes == before:
                return search.found(point, moves, True)
        else:
            point = to
            moves.append(point)


def grid(axes: Sequence[Axis], evaluate: Evaluate, noise: float = 0.0) -> Found:
    """Every point of the lattice at once; the axes do not grow, and their ends are edges of the certificate.

    Args:
        evaluate: asked once, for all points.
        noise: standard deviation of a loss; of points within twice as much of the lowest the cheapest is taken.
    """
    search = _Search(list(axes), evaluate, noise)
    points = [tuple(values) for values in product(*(axis.values for axis in axes))]
    complete = search.ask(points)
    tried = [point for point in points if point in search.losses]
    best = search.best(tried or points)
    return search.found(best, [best], complete)
