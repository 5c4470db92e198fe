"""Validation loss over all ranks: every rank makes the same number of forwards, short ones on masked rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from trainer import distributed
from trainer.data.batches import Batches
from trainer.guard.faults import fault
from trainer.model.loss import summed_loss, token_count


@dataclass(frozen=True)
class Measured:
    """Loss on the validation text of one source."""

    loss: float
    """Mean over the tokens, in nats."""
    tokens: int
    """Targets that were predicted."""
    bytes: int
    """Bytes of the text that they stand for."""

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / max(self.bytes, 1)


def mixed(results: dict[str, Measured], weights: dict[str, Fraction]) -> tuple[float, float]:
    """(loss in nats per token, bits per byte) of text whose tokens come from the sources in the shares of `weights`."""
    loss = sum(float(weights[name]) * result.loss for name, result in results.items())
    density = sum(float(weights[n]) * max(r.bytes, 1) / max(r.tokens, 1) for n, r in results.items())
    return loss, loss / math.log(2) / density


def validation_losses(run: Any, between: Callable[[], None] = lambda: None) -> dict[str, Measured]:
    """Loss on the validation sequences of each source, or on the first `evaluate.sequences` of each.

    Args:
        between: called after every batch; it may raise, on all ranks alike, to end the validation.
    """
    run.model.eval()
    try:
        return {
            name: _measure(run, batches, run.data.validation[name].sequences, between)
            for name, batches in run.validation.items()
        }
    finally:
        run.model.train()
        run.strategy.settle(run.model)


@torch.no_grad()
def _measure(run: Any, batches: Batches, total: int, between: Callable[[], None]) -> Measured:
    total = min(total, run.config.evaluate.sequences or total)
    portion = distributed.world() * batches.rows
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, total, portion):
        count = min(portion, total - start)
        for batch in batches.at(start, count):
            with run.strategy.context():
                loss = summed_loss(run.strategy.forward, *batch.to(run.device))
            sums += torch.tensor([float(loss), token_count(batch.targets)], dtype=torch.float64)
        fault("validate.batch")
        between()
    loss_sum, tokens = distributed.sum_over_ranks(sums.tolist(), run.device)
    return Measured(loss_sum / max(tokens, 1.0), int(tokens), batches.bytes(0, total))
