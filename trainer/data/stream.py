"""The training data of a run as one endless stream of sequences: a position is all that it takes to find any of them."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.mixture import Passes
from trainer.data.order import name_seed, permute, sequence_ids
from trainer.data.table import Rows

Tokens = NDArray[np.int64]


class Subset:
    """The first `count` rows of a permutation keyed by `seed`: subsets of one seed are nested."""

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        self._rows, self.sequences, self._seed = rows, count, seed

    def rows(self, ids: NDArray[np.int64]) -> tuple[Tokens, NDArray[np.int64]]:
        return self._rows.rows(self.ids(ids))

    def bytes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._rows.bytes(self.ids(ids))

    def ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids in the whole table of the subset's sequences."""
        # No epoch has the key -1: which sequences are chosen never coincides with the order of a pass.
        return permute(ids, self._rows.sequences, (self._seed, -1))


class Part(NamedTuple):
    """One source of a stream."""

    rows: Rows
    weight: Fraction


class Stream(Passes):
    """The stream of one or several sources. The sources' order in `parts` decides ties: give them sorted by name."""

    def __init__(self, parts: dict[str, Part], order_seed: int, epoch_order: str = "reshuffle") -> None:
        super().__init__(
            {n: part.weight for n, part in parts.items()}, {n: part.rows.sequences for n, part in parts.items()}
        )
        self.sources = [parts[name].rows for name in self.names]
        self.reshuffle = epoch_order == "reshuffle"
        # The only source of a run keeps the run's seed; those of a mixture each have their own permutations.
        self._seeds = [order_seed] if len(self.names) == 1 else [name_seed(order_seed, name) for name in self.names]

    def rows(self, positions: NDArray[np.int64]) -> tuple[Tokens, NDArray[np.int64]]:
        """(tokens (n, L + 1), bytes of text behind each row's targets (n,)) at the positions."""
        tokens: Tokens | None = None
        sizes = np.empty(len(positions), np.int64)
        for rows, ids, here in self._find(positions):
            found, sizes[here] = rows.rows(ids)
            if tokens is None:
                tokens = np.empty((len(positions), found.shape[1]), np.int64)
            tokens[here] = found
        assert tokens is not None, "no positions"
        return tokens, sizes

    def bytes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of text behind the targets of each row (n,)."""
        sizes = np.zeros(len(positions), np.int64)
        for rows, ids, here in self._find(positions):
            sizes[here] = rows.bytes(ids)
        return sizes

    def ids(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(index of the source, id of the sequence in it) at the positions."""
        sources, indices = self.schedule.at(positions)
        ids = np.empty_like(indices)
        for source in np.unique(sources):
            here = sources == source
            n, seed = self.sources[source].sequences, self._seeds[source]
            ids[here] = sequence_ids(indices[here], n, seed, reshuffle=self.reshuffle)
        return sources, ids

    def _find(self, positions: NDArray[np.int64]) -> list[tuple[Rows, NDArray[np.int64], NDArray[np.bool_]]]:
        sources, ids = self.ids(positions)
        return [(self.sources[s], ids[sources == s], sources == s) for s in np.unique(sources)]
