"""Loss over the number of members, with intervals by a paired bootstrap over sequences.

Every draw takes sequences with replacement, the same ones for all subsets, so that what sequences have in common drops out
of differences (Efron and Tibshirani 1993, "An introduction to the bootstrap", chapters 8 and 13). Sources of a mixture are
drawn apart from each other. The intervals are about the text: they do not tell how other seeds would have come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
NUMBERS = 2**21
"""Counts that are drawn at a time: 16 MB."""


@dataclass(frozen=True)
class Source:
    """Losses on the text of one source."""

    weight: float
    """Its share of the tokens that are asked about."""
    losses: NDArray[np.float64]
    """(subsets, sequences): nats, summed over the tokens of a sequence."""
    tokens: NDArray[np.float64]
    """(sequences,): predicted tokens."""


def losses(sources: Sequence[Source]) -> NDArray[np.float64]:
    """(subsets,) mean loss per token, in nats."""
    parts = [source.weight * source.losses.sum(1) / max(source.tokens.sum(), 1.0) for source in sources]
    return np.sum(parts, axis=0)


def resampled(sources: Sequence[Source], draws: int, seed: int) -> NDArray[np.float64]:
    """(draws, subsets) mean losses per token of text drawn anew, the same text for all subsets."""
    generator = np.random.default_rng(seed)
    total = np.zeros((draws, len(sources[0].losses)))
    for source in sources:
        count = len(source.tokens)
        share = max(1, NUMBERS // count)
        for start in range(0, draws, share):
            stop = min(start + share, draws)
            times = generator.multinomial(count, np.full(count, 1 / count), size=stop - start).astype(np.float64)
            total[start:stop] += (
                source.weight * (times @ source.losses.T) / np.maximum(times @ source.tokens, 1.0)[:, None]
            )
    return total


def interval(draws: NDArray[np.float64]) -> list[float]:
    """The middle 95% of the draws, of shape (draws,)."""
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(draws, [tail, 1 - tail])]


def curve(
    subsets: Sequence[tuple[int, ...]], values: NDArray[np.float64], draws: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """One point per number of members: the mean over the subsets of this size.

    Args:
        values: (subsets,) losses; draws: (draws, subsets), of the same rule.

    Returns:
        Per size: `loss` and its `interval`; `best` and `worst` subset's loss; `gain`, how much lower it is than the mean of
        single members, and `step`, than with one member less, each with the interval of the paired difference.
    """
    members = max(len(subset) for subset in subsets)
    points: list[dict[str, Any]] = []
    before = first = np.zeros(0, np.int64)
    for size in range(1, members + 1):
        here = np.flatnonzero([len(subset) == size for subset in subsets])
        point: dict[str, Any] = {
            "members": size,
            "subsets": len(here),
            "of": comb(members, size),
            "loss": float(values[here].mean()),
            "interval": interval(draws[:, here].mean(1)),
            "best": float(values[here].min()),
            "worst": float(values[here].max()),
        }
        if size == 1:
            first = here
        else:
            for name, other in (("gain", first), ("step", before)):
                point[name] = float(values[other].mean() - values[here].mean())
                point[f"{name}_interval"] = interval(draws[:, other].mean(1) - draws[:, here].mean(1))
        before = here
        points.append(point)
    return points
