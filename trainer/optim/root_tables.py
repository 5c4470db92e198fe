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

# Longer side over the shorter: the steps that `benchmarks/fit_polar.py` finds.
FITTED: dict[float, Steps] = {
    1.0: (
        (8.3404, -24.7447, 18.3643),
        (4.1031, -3.1602, 0.61),
        (3.851, -3.0554, 0.6253),
        (3.1075, -2.4716, 0.5596),
        (2.1799, -1.6036, 0.4425),
    ),
    1.5: (
        (5.3592, -15.8976, 11.798),
        (4.2766, -7.9705, 3.7248),
        (3.8739, -6.2602, 2.7808),
        (2.9371, -3.2508, 1.2624),
        (2.874, -3.0819, 1.1935),
    ),
    2.0: (
        (5.0959, -15.018, 11.1053),
        (4.3005, -8.6375, 4.4088),
        (3.8939, -6.6337, 3.1276),
        (2.9402, -3.2865, 1.3065),
        (2.8772, -3.0763, 1.1889),
    ),
    4.0: (
        (5.2499, -15.5733, 11.5574),
        (4.0126, -7.7916, 3.7939),
        (4.0942, -7.7916, 4.0904),
        (2.9762, -3.4081, 1.3793),
        (2.8765, -3.091, 1.2027),
    ),
    8.0: (
        (5.4032, -15.9477, 11.8155),
        (4.1257, -7.5238, 3.4406),
        (3.892, -6.5558, 3.0527),
        (2.9459, -3.2888, 1.2988),
        (2.8736, -3.0809, 1.197),
    ),
}


def for_shape(name: str, rows: int, columns: int) -> Schedule:
    """The steps for an (m, n) matrix: `fitted` to the aspect ratio nearest to its own, `published`, or a schedule's name.

    Raises:
        ValueError: `published` for a shape that is not.
    """
    short, long = sorted((rows, columns))
    if name == "fitted":
        return 1.0, FITTED[min(FITTED, key=lambda aspect: abs(math.log(long / (short * aspect))))]
    if name != "published":
        return schedule(name)
    if (short, long) not in PUBLISHED:
        known = ", ".join(f"{low} x {high}" for low, high in PUBLISHED)
        raise ValueError(f"the paper has no coefficients for {rows} x {columns}, only for {known}; use polar: fitted")
    return 1.0, (PUBLISHED[short, long],) * 5
