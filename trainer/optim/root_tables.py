"""Coefficients of ROOT's Newton-Schulz steps. Imports no torch."""

from __future__ import annotations

import math

from trainer.optim.polar import Schedule, Steps, schedule

# (shorter side, longer side): all that is published (arXiv 2511.20626), each a triple for five steps.
PUBLISHED: dict[tuple[int, int], tuple[float, float, float]] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}

STEPS = 5  # of all of them

SAFETY = 1.07
"""What norms are multiplied by: 5% more than the fit assumes. Its steps are so steep at a singular value of 1 that half precision, which
rounds a norm, would throw one 1 x 9 matrix in six out of the interval in which they converge, and it would blow up."""

# Longer side over the shorter: the steps that `benchmarks/fit_polar.py` finds, for norms times 1.02.
FITTED: dict[float, Steps] = {
    1.0: (
        (8.4781, -26.171, 20.2089),
        (3.9987, -3.0371, 0.5781),
        (3.7153, -3.0102, 0.6289),
        (3.0866, -2.5715, 0.6071),
        (2.2938, -1.8502, 0.5521),
    ),
    1.5: (
        (5.1142, -14.9424, 11.346),
        (3.5606, -7.0013, 3.4522),
        (4.367, -10.5378, 6.9719),
        (3.1427, -4.1354, 1.8981),
        (2.8949, -3.2168, 1.2984),
    ),
    2.0: (
        (5.2659, -16.2505, 12.5466),
        (3.526, -6.9403, 3.4259),
        (4.4552, -10.9111, 7.3572),
        (3.0701, -3.8572, 1.7075),
        (2.8716, -3.1413, 1.2517),
    ),
    4.0: (
        (5.2054, -15.9693, 12.304),
        (3.5181, -6.9093, 3.449),
        (4.4724, -10.9081, 7.3472),
        (3.083, -3.8054, 1.6558),
        (2.8842, -3.1291, 1.2301),
    ),
    8.0: (
        (8.4221, -25.9923, 20.0686),
        (3.9017, -3.0031, 0.5796),
        (3.6912, -3.1444, 0.6977),
        (3.0076, -2.4681, 0.5954),
        (2.0938, -1.5563, 0.4543),
    ),
}


def for_shape(name: str, rows: int, columns: int) -> Schedule:
    """The steps for an (m, n) matrix: `fitted` to the aspect ratio nearest to its own, `published`, or a schedule's name.

    Raises:
        ValueError: `published` for a shape that is not.
    """
    short, long = sorted((rows, columns))
    if name == "fitted":
        return SAFETY, FITTED[min(FITTED, key=lambda aspect: abs(math.log(long / (short * aspect))))]
    if name != "published":
        return schedule(name)
    if (short, long) not in PUBLISHED:
        known = ", ".join(f"{low} x {high}" for low, high in PUBLISHED)
        raise ValueError(f"the paper has no coefficients for {rows} x {columns}, only for {known}; use polar: fitted")
    return 1.0, (PUBLISHED[short, long],) * STEPS
