"""Validation loss over all ranks: every rank makes the same number of forwards, short ones on masked rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer import distributed
from trainer.model.loss import summed_loss, token_count


def bits_per_byte(loss: float, tokens: int, count: int) -> float:
    """Mean loss in nats per token -> bits per byte of the text that the tokens stand for."""
    return loss * tokens / math.log(2) / max(count, 1)


@torch.no_grad()
def validation_loss(run: Any) -> tuple[float, int, int]:
    """(mean loss in nats, tokens, bytes) over the validation sequences, or the first `evaluate.sequences` of them."""
    total = run.table.validation.sequences
    total = min(total, run.config.evaluate.sequences or total)
    portion = distributed.world() * run.validation.rows
    run.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, total, portion):
        count = min(portion, total - start)
        for inputs, targets in run.validation.at(start, count):
            with run.strategy.forward_context(run.config.train.precision, run.device):
                loss = summed_loss(run.model, inputs.to(run.device), targets.to(run.device))
            sums += torch.tensor([float(loss), token_count(targets)], dtype=torch.float64)
    run.model.train()
    run.strategy.settle(run.model)
    loss_sum, tokens = distributed.sum_over_ranks(sums.tolist(), run.device)
    return loss_sum / max(tokens, 1.0), int(tokens), run.validation.bytes(0, total)
