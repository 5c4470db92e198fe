"""What a teacher says about some tokens, as what its distributions follow from: never as tokens x vocabulary numbers.

`Dense`: hidden states and heads of the members. With linear heads the logit mean is one head of K d columns,
mean_k W_k h_k = [W_1 .. W_K] / K . [h_1; ..; h_K], one product that sums over the members in fp32. `Sparse`: some tokens
with their probabilities and the mass of all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def borders(first: int, last: int, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `columns` columns."""
    for start in range(first, last, columns):
        yield start, min(start + columns, last)


@dataclass(frozen=True)
class Heads:
    """The members' heads side by side.

    Args:
        matrix: (columns, K d), in the precision of the products.
        biases: (columns, K) in fp32 or wider, or None.
        vocabulary: columns that are tokens; padded ones behind them get no probability.
        probability_mean: mean_k softmax(z_k) instead of softmax(mean_k z_k).
    """

    matrix: Tensor
    biases: Tensor | None
    members: int
    vocabulary: int
    probability_mean: bool


class Dense:
    """Hidden states of the members, and their heads. No dataclass: FSDP2 would hand a forward a copy in its own precision.

    Args:
        states: (tokens, K d).
    """

    def __init__(self, states: Tensor, heads: Heads) -> None:
        self.states, self.heads = states, heads
        self.parts = torch.zeros(2, dtype=torch.float64)
        """Cross-entropy and divergence that the loss found, summed; nats."""

    def some(self, start: int, stop: int, columns: int) -> Logits:
        """The teacher of the tokens `start` to `stop`."""
        return Logits(self.states[start:stop], self.heads, columns)


class Logits:
    """The teacher's logits of a few tokens, block by block; up to a constant per token."""

    def __init__(self, states: Tensor, heads: Heads, columns: int) -> None:
        self.states, self.heads = states.to(heads.matrix.dtype), heads
        self.wide = torch.promote_types(heads.matrix.dtype, torch.float32)
        self.logs: list[Tensor] = []
        """Log-sum-exp of each member, for the mean of probabilities."""
        if heads.probability_mean and heads.members > 1:
            for member in range(heads.members):
                log = torch.full(states.shape[:1], -torch.inf, dtype=self.wide, device=states.device)
                for first, last in borders(0, heads.vocabulary, columns):
                    log = torch.logaddexp(log, self._one(member, first, last).logsumexp(1))
                self.logs.append(log)

    def block(self, first: int, last: int) -> Tensor:
        """(tokens, last - first) in fp32 or wider, in memory of its own."""
        count = self.heads.members
        if self.logs:
            found = torch.full((len(self.states), last - first), -torch.inf, dtype=self.wide, device=self.states.device)
            for member in range(count):
                found = torch.logaddexp(found, self._one(member, first, last) - self.logs[member][:, None])
            return found.sub_(math.log(count))
        found = F.linear(self.states, self.heads.matrix[first:last]).to(self.wide)
        if count > 1:
            found.div_(count)
        if self.heads.biases is not None:
            found.add_(self.heads.biases[first:last].mean(1))
        return found

    def _one(self, member: int, first: int, last: int) -> Tensor:
        """Logits of one member."""
        width = self.states.shape[1] // self.heads.members
        own = slice(member * width, (member + 1) * width)
        found = F.linear(self.states[:, own], self.heads.matrix[first:last, own]).to(self.wide)
        if self.heads.biases is not None:
            found.add_(self.heads.biases[first:last, member])
        return found


class Sparse:
    """Some tokens with their probabilities, at temperature 1; equal ids do not stand twice in a row.

    Args:
        ids: (tokens, k) int64; `NONE` fills a row.
        probabilities: (tokens, k); 0 where a row is filled.
        rest: (tokens,) log of the mass of all other tokens, which one bucket holds on both sides; -inf for none.
    """

    def __init__(self, ids: Tensor, probabilities: Tensor, rest: Tensor) -> None:
        self.ids, self.probabilities, self.rest = ids, probabilities, rest
        self.parts = torch.zeros(2, dtype=torch.float64)
        """As that of `Dense`."""

    def some(self, start: int, stop: int, columns: int) -> Sparse:
        """The teacher of the tokens `start` to `stop`."""
        return Sparse(self.ids[start:stop], self.probabilities[start:stop], self.rest[start:stop])


NONE = 2**62
"""The id of no token."""
