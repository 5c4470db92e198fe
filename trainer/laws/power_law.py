"""The law y = A x^-B + C by least squares, for many noisy copies of the losses at once.

For a fixed exponent the law is linear in (A, C), so that what is left is a search over B alone (variable projection;
Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973). It is done for all copies together: a grid over log B, then a golden
section around its best point. That makes a bootstrap of a thousand refits a matter of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

PARAMETERS = 3
EXPONENTS = (1e-3, 10.0)
"""Least and largest exponent: below, x^-B cannot be told from a logarithm; above, from a step."""
GRID = 97
GOLDEN_STEPS = 20
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Fits:
    """R fits; every field has the shape (R,)."""

    a: Array
    b: Array
    c: Array
    squares: Array
    """Sum of squared residuals."""

    def at(self, x: Array) -> Array:
        """The fitted losses, (R, len(x))."""
        return np.asarray(self.a[:, None] * x[None, :] ** -self.b[:, None] + self.c[:, None])


def fit_many(x: Array, y: Array) -> Fits:
    """Unweighted least squares under A >= 0, 0 <= C <= min(y) and `EXPONENTS`.

    The bounds are those of the paper's fits (arXiv 2509.14786, all >= 0), and that no asymptote lies above a loss that
    was seen.

    Args:
        x: (n,) positive, at least three distinct values.
        y: (R, n) losses of R copies of the experiment.
    """
    middle = float(np.exp(np.log(x).mean()))  # a fit in other units of x then differs in A alone
    u = np.log(x / middle)
    edges = np.linspace(np.log(EXPONENTS[0]), np.log(EXPONENTS[1]), GRID)
    best = _squares(np.exp(-np.exp(edges)[:, None] * u[None, :]), y).argmin(axis=1)
    low, high = edges[np.maximum(best - 1, 0)], edges[np.minimum(best + 1, GRID - 1)]
    t = _golden(lambda t: _project(np.exp(-np.exp(t)[:, None] * u[None, :]), y)[0], low, high)
    b = np.exp(t)
    squares, a, c = _project(np.exp(-b[:, None] * u[None, :]), y)
    return Fits(a * middle**b, b, c, squares)


def _squares(g: Array, y: Array) -> Array:
    """(R, M) sums of squares of `_project` for the same M rows of x^-B, `g` (M, n), in all R copies: matrix products."""
    mean_g, mean_y = g.mean(axis=1), y.mean(axis=1)
    centred_g, centred_y = g - mean_g[:, None], y - mean_y[:, None]
    across, within = centred_y @ centred_g.T, (centred_g**2).sum(axis=1)
    a = across / within
    c = mean_y[:, None] - a * mean_g
    ceiling = y.min(axis=1)[:, None]
    free = (centred_y**2).sum(axis=1)[:, None] - across * a
    bound = np.where(c < 0, 0.0, ceiling)
    above = (centred_y**2).sum(axis=1)[:, None] + y.shape[1] * (mean_y[:, None] - bound) ** 2  # of y - bound
    along = np.maximum(y @ g.T - bound * g.sum(axis=1), 0.0)
    bounded = above - along**2 / (g**2).sum(axis=1)
    return np.asarray(np.where((a >= 0) & (c >= 0) & (c <= ceiling), free, bounded))


def _project(g: Array, y: Array) -> tuple[Array, Array, Array]:
    """The best A and C for given x^-B. `g` and `y` are (R, n); returns squares, A, C of shape (R,).

    The problem is convex in (A, C): where the free optimum breaks a bound, the answer lies on a bound of C.
    """
    ceiling = y.min(axis=1)
    mean_g, mean_y = g.mean(axis=1), y.mean(axis=1)
    centred = g - mean_g[:, None]
    a = (centred * (y - mean_y[:, None])).sum(axis=1) / (centred**2).sum(axis=1)
    c = mean_y - a * mean_g
    inside = (a >= 0) & (c >= 0) & (c <= ceiling)
    bound = np.where(c < 0, 0.0, ceiling)
    a = np.where(inside, a, np.maximum((g * (y - bound[:, None])).sum(axis=1) / (g**2).sum(axis=1), 0.0))
    c = np.where(inside, c, bound)
    return ((y - a[:, None] * g - c[:, None]) ** 2).sum(axis=1), a, c


def _golden(of: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """The least point of one function per row between `low` and `high`, all (R,)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = of(left), of(right)
    for _ in range(GOLDEN_STEPS):
        down = at_left < at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        new = np.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = of(new)
        left, right = np.where(down, new, right), np.where(down, left, new)
        at_left, at_right = np.where(down, at_new, at_right), np.where(down, at_left, at_new)
    return np.asarray(np.where(at_left < at_right, left, right))
