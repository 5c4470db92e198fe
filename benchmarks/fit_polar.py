"""Fits the coefficients of ROOT's Newton-Schulz steps: a triple per step, for each aspect ratio of a matrix.

    OMP_NUM_THREADS=1 python benchmarks/fit_polar.py

Prints the table FITTED of `trainer/optim/root_tables.py`, in some minutes, and below each entry what it and the alternatives leave of
each spectrum. Minimized is the mean of (f(sigma) - 1)^2 over the singular values of Gaussian matrices of several sizes and that
aspect, plus a share of the same over power laws, so that f stays useful where a spectrum is not Gaussian. Kept are: a slope of f at
zero of at least 480 (small singular values must grow as fast as under Muon's triple), f between 0.4 and 1.2 for singular values of
0.01 to 1 and never negative (a matrix of rank one must not blow up, or turn round), and at most 2 on the way; also where bf16
swells the values by 1% in each step. The optimizer divides by 1.07 where the fit divides by 1.02, and so never comes near the end of
that interval (`root_tables.SAFETY`). Levenberg-Marquardt
from three known schedules, under bounds that weigh more and more; they are checked on the rounded result.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.optimizer_tables import gaussian_spectrum, polynomial_error
from trainer.optim.polar import COEFFICIENTS

Array = NDArray[np.float64]

ASPECTS = (1.0, 1.5, 2.0, 4.0, 8.0)
SHORT = (512, 1024, 2048, 4096)
POWERS = (0.5, 1.0)
POWER_SHARE = 0.05
SLOPE, END, BETWEEN = 480.0, 1.2, 2.0
LEAST, FLAT = 0.4, 0.01
SAFETY, SWELLS = 1.02, (1.0, 1.01)
STARTS = ("quintic", "polar-express", "cans")
WEIGHTS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def iterated(steps: Array, sigma: Array, swell: float = 1.0) -> tuple[list[Array], Array]:
    """The singular values (n,), divided by SAFETY, after each of the steps (K, 3), and the derivative (n, 3K) of the last
    ones; `swell` multiplies them after each step, as rounding might."""
    slope, after, sigma = np.zeros((len(sigma), steps.size)), [], sigma / SAFETY
    for k, (a, b, c) in enumerate(steps):
        slope *= (a + 3 * b * sigma**2 + 5 * c * sigma**4)[:, None]
        slope[:, 3 * k : 3 * k + 3] = np.stack([sigma, sigma**3, sigma**5], 1)
        sigma = swell * (a * sigma + b * sigma**3 + c * sigma**5)
        slope *= swell
        after.append(sigma)
    return after, slope


def spectra(aspect: float) -> list[tuple[float, Array]]:
    """(weight, singular values over their root sum of squares)."""
    found = [((1 - POWER_SHARE) / len(SHORT), gaussian_spectrum(s, round(s * aspect))) for s in SHORT]
    found += [(POWER_SHARE / len(POWERS), np.arange(1, 1025.0) ** -p) for p in POWERS]
    return [(weight, s / np.sqrt(np.sum(s**2))) for weight, s in found]


def error(steps: Array, inputs: list[tuple[float, Array]]) -> float:
    """What is minimized."""
    return float(sum(w * np.mean((iterated(steps, s)[0][-1] - 1) ** 2) for w, s in inputs))


def residuals(
    steps: Array, inputs: list[tuple[float, Array]], grid: Array, weight_of_bounds: float
) -> tuple[Array, Array]:
    """What is squared and added up, and its derivative by all coefficients."""
    values, slopes = [], []
    for weight, s in inputs:
        after, slope = iterated(steps, s)
        scale = np.sqrt(weight / len(s))
        values.append(scale * (after[-1] - 1))
        slopes.append(scale * slope)
    for k, swell in itertools.product(
        range(1, len(steps) + 1), SWELLS
    ):  # a little within the bounds: the result is rounded
        after, slope = iterated(steps[:k], grid, swell)
        last = k == len(steps)
        high = np.maximum(after[-1] - (END if last else BETWEEN) + 0.04, 0)
        low = np.minimum(after[-1] - (LEAST + 0.02) * np.minimum(grid / FLAT, 1) * last, 0)
        scale = np.sqrt(weight_of_bounds / len(grid))
        values.append(scale * (high + low))
        slopes.append(np.pad(scale * ((high > 0) | (low < 0))[:, None] * slope, ((0, 0), (0, steps.size - 3 * k))))
    first = steps[:, 0]
    lacking = max(np.log(SLOPE * SAFETY * 1.002) - np.sum(np.log(np.maximum(first, 1e-3))), 0.0)
    values.append(np.array([lacking]))
    slopes.append(np.zeros((1, steps.size)))
    slopes[-1][0, ::3] = -float(lacking > 0) / np.maximum(first, 1e-3)
    return np.concatenate(values), np.concatenate(slopes)


def descend(
    steps: Array, inputs: list[tuple[float, Array]], grid: Array, weight_of_bounds: float, rounds: int = 300
) -> Array:
    """Levenberg-Marquardt: a step is taken only if it lowers the sum of squares."""
    damping = 1e-3
    value, slope = residuals(steps, inputs, grid, weight_of_bounds)
    for _ in range(rounds):
        normal = slope.T @ slope
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), slope.T @ value)
        tried = steps - move.reshape(steps.shape)
        other, other_slope = residuals(tried, inputs, grid, weight_of_bounds)
        lower = other @ other < value @ value and np.isfinite(other_slope).all()
        if lower:
            gain = 1 - (other @ other) / (value @ value)
            steps, value, slope, damping = tried, other, other_slope, max(damping / 3, 1e-9)
            if gain < 1e-9:
                break
        elif (damping := damping * 4) > 1e9:
            break
    return steps


def keeps_bounds(steps: Array) -> bool:
    """Whether rounded steps keep what the residuals ask for."""
    sigma = np.linspace(1e-5, 1, 100_000)
    for swell in SWELLS:
        after, _ = iterated(steps, sigma, swell)
        low = np.all(after[-1] >= LEAST * np.minimum(sigma / FLAT, 1))
        if not low or after[-1].max() > END or max(np.abs(values).max() for values in after) > BETWEEN:
            return False
    return bool(np.prod(steps[:, 0]) / SAFETY >= SLOPE)


def fit(aspect: float) -> Array:
    """The best of fits from several starts, to four places."""
    inputs, grid = spectra(aspect), np.concatenate([np.logspace(-4, -1.3, 150), np.linspace(0.05, 1, 1500)])
    found = []
    for name in STARTS:
        steps = np.array(COEFFICIENTS[name][1])
        for weight in WEIGHTS:
            steps = descend(steps, inputs, grid, weight)
        found.append(steps.round(4))
    kept = [steps for steps in found if keeps_bounds(steps)]
    assert kept, f"no start keeps the bounds at aspect {aspect}"
    return min(kept, key=lambda steps: error(steps, inputs))


def main() -> None:
    np.seterr(over="ignore", invalid="ignore")  # of trials that are then refused
    for aspect in ASPECTS:
        fitted, inputs = fit(aspect), spectra(aspect)
        print(f"    {aspect}: (", *(f"        ({a:g}, {b:g}, {c:g})," for a, b, c in fitted), "    ),", sep="\n")
        left = [f"{np.mean((iterated(fitted, s)[0][-1] - 1) ** 2):.1e}" for _, s in inputs]
        print(f"    # fitted: {', '.join(left)}; slope {np.prod(fitted[:, 0]) / SAFETY:.0f}")
        for name in ("simple", "quintic"):
            left = [f"{polynomial_error(s, name, 'frobenius'):.1e}" for _, s in inputs]
            print(f"    # {name}: {', '.join(left)}", flush=True)


if __name__ == "__main__":
    main()
