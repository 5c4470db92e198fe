"""Limits of nested power laws: K to infinity at every N, then N to infinity at every D, then the law over D.

Noise is drawn once, at the measured losses, and goes through all fits together, so that the interval of the last limit
holds what the first fits do not know (arXiv 2509.14786, section 3, gives these limits without intervals).

The bootstrap is parametric: refits of the fitted law plus normal noise. Its standard deviation is the one given, or the
residuals' over all laws of the innermost axis, divided by the root of a chi-squared share per copy: the residuals of n - 3
degrees of freedom do not know the noise any better. In a linear model that gives Student's t intervals exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.laws.points import AXES, Point
from trainer.laws.power_law import EXPONENTS, PARAMETERS, Array, fit_many
from trainer.outcome import RunError

INTERVAL = (0.025, 0.975)
TREND = 0.05
"""Probability of so good a fit to constant losses from which on there is no trend."""
MISFIT = 0.01
"""Probability of so large residuals under the law below which it does not fit; small, as tables have many laws."""
NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Law:
    """y = a x^-b + c along one axis, the other coordinates held."""

    axis: str
    at: dict[str, float]
    """The coordinates that are held."""
    x: Array
    y: Array
    """(n,) measured losses, or limits of the laws inside."""
    a: float
    b: float
    c: float
    draws: Array | None
    """(3, R): a, b, c of the copies; None where nothing is known about the noise."""
    trend: float | None
    """Probability that constant losses with this noise are fitted as well."""
    misfit: float | None
    """Probability of residuals as large as these if the law held."""

    def fitted(self, x: Array) -> Array:
        """The law's losses at `x`, in the shape of `x`."""
        return np.asarray(self.a * x**-self.b + self.c)

    @property
    def residuals(self) -> Array:
        """(n,) loss less fitted loss."""
        return np.asarray(self.y - self.fitted(self.x))

    def interval(self, name: str) -> tuple[float, float] | None:
        """95% interval of `a`, `b` or `c`."""
        if self.draws is None:
            return None
        low, high = np.quantile(self.draws[NAMES.index(name)], INTERVAL)
        return float(low), float(high)

    @property
    def flags(self) -> list[str]:
        """What the points do not tell, each a word and its reason; empty where the law is identified."""
        least, span = float(self.y.min()), float(np.ptp(self.y))
        low = self.c
        found = []
        if self.draws is None:
            found.append(
                f"no interval: {len(self.x)} losses leave nothing to estimate noise from; add repeats, or give --noise"
            )
        else:
            low, _ = self.interval("c") or (low, low)
            exponent = self.interval("b") or EXPONENTS
            if exponent[0] < EXPONENTS[0] * 1.1 or exponent[1] > EXPONENTS[1] / 1.1:
                found.append("exponent unidentified: its interval reaches a bound of the fit")
        if low <= least - span:
            what = "the limit" if self.draws is None else "the lower end of the limit's interval"
            found.append(
                f"limit unidentified: {what}, {low:.4f}, lies further below the least loss than the losses span"
            )
        if self.trend is not None and self.trend > TREND:
            found.append(f"no trend: constant losses are fitted as well with probability {self.trend:.2f}")
        if self.misfit is not None and self.misfit < MISFIT:
            found.append(
                f"misfit: residuals up to {abs(self.residuals).max():.4f} are more than the noise explains "
                f"(probability {self.misfit:.2f}), so the intervals are too narrow"
            )
        return found


@dataclass(frozen=True)
class Stage:
    """All laws along one axis, one for each place on the axes that are still to come."""

    axis: str
    laws: list[Law]


@dataclass(frozen=True)
class Limits:
    """The stages of one recipe, from the innermost axis out."""

    stages: list[Stage]
    noise: float | None
    """Standard deviation of a measured loss: given, or from the residuals of the first stage."""
    degrees: int | None
    """Degrees of freedom of `noise`; None where it was given."""


def limits(points: Sequence[Point], *, noise: float | None = None, draws: int = 1000, seed: int = 0) -> Limits:
    """Fit the laws of one recipe along its axes, K inside N inside D.

    Args:
        points: at least three distinct places on each axis, everywhere on the axes outside it.
        noise: standard deviation of a loss in nats, if it is known (repeats with other seeds).
        draws: copies in the bootstrap, R.

    Raises:
        RunError: there are too few places on an axis.
    """
    axes = [axis for axis in AXES if axis in points[0].coords]
    table = [(point.coords, point.where) for point in points]
    y = np.array([p.loss for p in points])
    groups = _groups(table, axes[0])
    inner = [(x, fit_many(x, y[rows][None])) for _, rows, x in groups]
    degrees = len(points) - PARAMETERS * len(groups)
    rng = np.random.default_rng(seed)
    copies, scale = None, noise
    if noise is None and degrees > 0:
        scale = float(np.sqrt(sum(fit.squares[0] for _, fit in inner) / degrees))
    if scale is not None:
        copies = scale * rng.standard_normal((draws, len(points)))
        if noise is None:
            copies *= np.sqrt(degrees / rng.chisquare(degrees, size=(draws, 1)))
    stages = []
    for axis in axes:
        groups = _groups(table, axis)
        laws = [_law(axis, at, x, y[rows], copies[:, rows] if copies is not None else None) for at, rows, x in groups]
        stages.append(Stage(axis, laws))
        table = [(at, table[rows[0]][1]) for at, rows, _ in groups]
        y = np.array([law.c for law in laws])
        if copies is not None:
            # Deviations, so that the copies of the next stage lie around its own fitted law.
            copies = np.stack([law.draws[2] - law.c for law in laws if law.draws is not None], axis=1)
    return Limits(stages, scale, degrees if noise is None else None)


def _groups(table: list[tuple[dict[str, float], str]], axis: str) -> list[tuple[dict[str, float], list[int], Array]]:
    """The places outside an axis, the rows of each, and their values on the axis.

    Raises:
        RunError: one of them has fewer than three distinct values.
    """
    found: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, (coords, _) in enumerate(table):
        found.setdefault(tuple((k, v) for k, v in coords.items() if k != axis), []).append(number)
    groups = []
    for held, rows in found.items():
        values = sorted({table[row][0][axis] for row in rows})
        if len(values) < PARAMETERS:
            place = " at " + ", ".join(f"{k} = {v:g}" for k, v in held) if held else ""
            raise RunError(
                f"a law over {axis} needs at least 3 distinct {axis}, and there are {len(values)}{place}: "
                f"{axis} = {', '.join(f'{v:g}' for v in values)}",
                where=table[rows[0]][1],
                mend=f"add points, or leave the cells of column {axis} empty to fit over the other axes alone",
            )
        groups.append((dict(held), rows, np.array([table[row][0][axis] for row in rows])))
    return groups


def _law(axis: str, at: dict[str, float], x: Array, y: Array, copies: Array | None) -> Law:
    """One law; `copies` (R, n) are the deviations of the losses in each copy."""
    one = fit_many(x, y[None])
    draws, trend, misfit = None, None, None
    if copies is not None:
        again = fit_many(x, one.at(x) + copies)
        draws = np.stack([again.a, again.b, again.c])
        trend = _trend(x, y, float(one.squares[0]), copies)
        misfit = float((again.squares >= one.squares[0]).mean())
    return Law(axis, at, x, y, float(one.a[0]), float(one.b[0]), float(one.c[0]), draws, trend, misfit)


def _trend(x: Array, y: Array, squares: float, copies: Array) -> float:
    """How often constant losses with this noise are bettered by a law as much as these are; an F test by simulation."""
    constant = y.mean() + copies
    centred = constant - constant.mean(axis=1, keepdims=True)
    gain = (centred**2).sum(axis=1) - fit_many(x, constant).squares
    seen = float(((y - y.mean()) ** 2).sum()) - squares
    return float((gain >= seen).mean())
