"""Which source gives each sequence of a mixture: an exact schedule in integers, the same for any number of ranks.

With weights w_i = a_i / M, the j-th sequence of source i (from 1) must stand at one of the places
floor((j - 1) M / a_i) ... ceil(j M / a_i) - 1. The earliest deadline first meets all these windows, since they are those
of proportionate fairness on one machine (Baruah, Cohen, Plaxton, Varvel 1996, "Proportionate progress"); so at every
prefix p the count of each source differs from w_i p by less than one. After M sequences all counts are exact and the
schedule repeats: one period is a table, and a seek is a division.
"""

from __future__ import annotations

import heapq
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray


class Schedule:
    """The sources' turns. `counts[i]` of the `period` sequences of a period come from source i."""

    def __init__(self, weights: list[Fraction]) -> None:
        if sum(weights) != 1 or min(weights) <= 0:
            raise ValueError(f"weights {[str(w) for w in weights]} are not positive with the sum 1")
        self.period = lcm(*(weight.denominator for weight in weights))
        self.counts = [int(weight * self.period) for weight in weights]
        self._turns = _earliest_deadline_first(self.period, self.counts)  # place in the period -> source
        self._places = [np.flatnonzero(self._turns == source) for source in range(len(weights))]
        self._nth = np.empty(self.period, np.int64)  # place -> how many of its source came before in the period
        for places in self._places:
            self._nth[places] = np.arange(len(places))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position: its source, and how many sequences of that source came before it."""
        rounds, places = np.divmod(positions, self.period)
        sources = self._turns[places].astype(np.int64)
        return sources, rounds * np.array(self.counts)[sources] + self._nth[places]

    def taken(self, source: int, position: int) -> int:
        """Sequences of `source` among the first `position` of the mixture."""
        rounds, place = divmod(position, self.period)
        return rounds * self.counts[source] + int(np.searchsorted(self._places[source], place))

    def position_of(self, source: int, index: int) -> int:
        """The position of the sequence of `source` before which there are `index` of that source."""
        rounds, nth = divmod(index, self.counts[source])
        return rounds * self.period + int(self._places[source][nth])


class Passes:
    """Positions of a mixture in passes over its sources.

    Args:
        weights: exact shares of the sources, by name, with the sum 1. A source of share 0 has no place in any pass.
        sizes: sequences of one pass over each.
    """

    def __init__(self, weights: dict[str, Fraction], sizes: dict[str, int]) -> None:
        self.names = [name for name, weight in weights.items() if weight]
        self.sizes = {name: sizes[name] for name in self.names}
        self.schedule = Schedule([weights[name] for name in self.names])

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each source that the first `position` sequences make."""
        return {
            name: self.schedule.taken(index, position) / size for index, (name, size) in enumerate(self.sizes.items())
        }

    def after_epochs(self, number: float, name: str | None = None) -> int:
        """The position right after `number` passes over a source (the only one if it has no name)."""
        index = 0 if name is None else self.names.index(name)
        count = round(number * self.sizes[name or self.names[0]])
        return self.schedule.position_of(index, count - 1) + 1 if count else 0

    def first_exhausted(self, max_epochs: int) -> tuple[int, str]:
        """The first position that would begin pass `max_epochs` + 1 over a source, and that source."""
        ends = [
            (self.schedule.position_of(index, max_epochs * size), name)
            for index, (name, size) in enumerate(self.sizes.items())
        ]
        return min(ends)


def _earliest_deadline_first(period: int, counts: list[int]) -> NDArray[np.int32]:
    turns = np.empty(period, np.int32)
    later = [(0, source, 0) for source in range(len(counts))]  # (release, source, which of its sequences)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, which of its sequences)
    for place in range(period):
        while later and later[0][0] <= place:
            _, source, index = heapq.heappop(later)
            deadline = -(-(index + 1) * period // counts[source])
            heapq.heappush(ready, (deadline, source, index))
        _, source, index = heapq.heappop(ready)
        turns[place] = source
        if index + 1 < counts[source]:
            heapq.heappush(later, ((index + 1) * period // counts[source], source, index + 1))
    return turns
