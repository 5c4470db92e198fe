"""Losses of every subset of an ensemble in one pass over chunks of tokens and vocabulary.

Logit mean: with linear heads, mean_k W_k h_k = [W_1 .. W_K] / K . [h_1; ..; h_K] is one model with a K d-wide head. Its
loss needs log-sum-exp over the vocabulary, which is accumulated online over blocks of columns, so that of all K logits
only (tokens, columns) blocks ever exist; the mean over any subset is a sum of such blocks. Probability mean: with
log p_k(y) of each member, log mean_k p_k(y) = logsumexp_k(log p_k(y)) - log K needs no logits at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.loss import MASKED

FLOATS = 2**21
"""Numbers in the logits of one block, of all members together: 8 MB in fp32, which a processor's cache holds in part."""


class Predictor(Protocol):
    """A member, as what its logits follow from."""

    def hidden(self, start: int, stop: int) -> Tensor:
        """Hidden states (tokens, d) of some of the tokens."""
        ...

    def head(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Some rows (columns, d) of the head, and their biases (columns,) if it has any."""
        ...


def chunks(members: int, width: int) -> tuple[int, int]:
    """(tokens, columns) of a block: less for more members, so that memory does not depend on their number.

    Args:
        width: of the hidden states, d.
    """
    side = math.isqrt(FLOATS // members)
    side = max(1, min(side, 2 * FLOATS // (members * width)))
    return side, side


@torch.no_grad()
def subset_losses(
    members: Sequence[Predictor], targets: Tensor, subsets: Sequence[tuple[int, ...]], vocabulary: int, *, tokens: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """Negative log-likelihood of every target under every subset, by both rules.

    Args:
        targets: (T,) token ids, `MASKED` where nothing is predicted.
        subsets: indices of members.
        vocabulary: columns of the heads that are tokens; padded ones behind them get no probability.
        tokens, columns: size of a block of logits; the result does not depend on it but by rounding.

    Returns:
        (2, subsets, T) in nats and fp64: logit mean, probability mean; 0 where targets are masked.
    """
    found = torch.zeros(2, len(subsets), len(targets), dtype=torch.float64)
    wide = [(member,) for member in range(len(members))] + [subset for subset in subsets if len(subset) > 1]
    place = {subset: index for index, subset in enumerate(wide)}
    for start in range(0, len(targets), tokens):
        wanted = targets[start : start + tokens]
        if bool((wanted == MASKED).all()):
            continue
        logs, logits = _log_sums(members, wide, wanted, start, vocabulary, columns)  # (wide, t), (members, t)
        own = logits - logs[: len(members)]  # log p_k(y)
        for index, subset in enumerate(subsets):
            chosen = list(subset)
            loss = torch.stack(
                [
                    logs[place[subset]] - logits[chosen].mean(0),
                    math.log(len(subset)) - own[chosen].logsumexp(0),
                ]
            )
            found[:, index, start : start + tokens] = loss.cpu().masked_fill(wanted == MASKED, 0.0)
    return found


def _log_sums(
    members: Sequence[Predictor], subsets: Sequence[tuple[int, ...]], targets: Tensor, start: int, vocabulary: int, columns: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-sum-exp of each subset's mean logits (subsets, t), and each member's logit of the target (members, t); fp64."""
    hidden = [member.hidden(start, start + len(targets)) for member in members]
    device = hidden[0].device
    targets = targets.to(device)
    logs = torch.full((len(subsets), len(targets)), -torch.inf, dtype=torch.float64, device=device)
    at = torch.zeros(len(members), len(targets), dtype=torch.float64, device=device)
    for first in range(0, vocabulary, columns):
        last = min(first + columns, vocabulary)
        blocks = []
        for index, (member, states) in enumerate(zip(members, hidden, strict=True)):
            block = F.linear(states, *member.head(first, last))  # (t, columns)
            inside = (targets >= first) & (targets < last)
            picked = block.gather(1, (targets - first).clamp(0, last - first - 1)[:, None])[:, 0]
            at[index] += picked.double().masked_fill(~inside, 0.0)
            blocks.append(block)
        for index, subset in enumerate(subsets):
            logs[index] = torch.logaddexp(logs[index], log_sum_exp(mean(blocks, subset)).double())
    return logs, at


def mean(blocks: Sequence[Tensor], subset: tuple[int, ...]) -> Tensor:
    """The mean of some of the blocks, in memory of its own."""
    total = blocks[subset[0]].clone()
    for member in subset[1:]:
        total += blocks[member]
    return total.div_(len(subset)) if len(subset) > 1 else total


def log_sum_exp(block: Tensor) -> Tensor:
    """Log-sum-exp (t,) over the columns of a block (t, columns), which is used up."""
    largest = block.amax(1)
    anchor = largest.masked_fill(largest == -torch.inf, 0.0)  # a block of padding alone adds nothing
    return block.sub_(anchor[:, None]).exp_().sum(1).log() + anchor
