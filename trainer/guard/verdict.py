"""One small all-reduce per step: what any rank saw, all ranks know, and all act alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.distributed import sum_over_ranks, world


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on before the update."""

    loss: float
    """Mean loss over the step's global tokens, in nats."""
    tokens: int
    """Targets of the step over all ranks."""
    gradient_norm: float
    """Norm of the gradient of the mean loss."""
    ratio: float
    """What gradients must be multiplied by to be those of the mean loss."""
    stop: str
    """Why the run should save and end now; empty if it should go on."""
    save_due: bool
    rejected: int
    """Matrices whose update the optimizer rejected in the step before, over all ranks."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def agree(
    parameters: list[Any], loss_sum: float, tokens: int, expected: int, *, signal: bool, timeout: bool, save_due: bool,
    rejected: int, device: torch.device,
) -> Verdict:  # fmt: skip
    """Reduce this rank's sums and flags. Gradients are of `loss_sum / expected`, and stay as they are."""
    square = float(local_square(parameters))
    facts = [loss_sum, float(tokens), square, float(signal), float(timeout), float(save_due), float(rejected)]
    total, count, square, signals, timeouts, saves, refused = sum_over_ranks(facts, device)
    ratio = expected / max(count, 1.0)
    return Verdict(
        loss=total / max(count, 1.0),
        tokens=int(count),
        gradient_norm=math.sqrt(square) * ratio if square >= 0 else math.nan,
        ratio=ratio,
        stop="a signal came" if signals else "train.time_limit is reached" if timeouts else "",
        save_due=saves > 0,
        rejected=int(refused),
    )


@torch.no_grad()
def local_square(parameters: list[Any]) -> Tensor:
    """This rank's part of the squared gradient norm, float64: shards as they are, replicas divided by their number."""
    shards: list[Tensor] = []
    wholes: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            shards.append(gradient.to_local())
        else:
            wholes.append(gradient)
    total = torch.zeros((), dtype=torch.float64)
    for tensors, copies in ((shards, 1), (wholes, world())):
        if tensors:
            norms = torch.stack([norm.double() for norm in torch._foreach_norm(tensors)])
            total = total + norms.square().sum().cpu() / copies
    return total


@torch.no_grad()
def scale_gradients(parameters: list[Any], factor: float) -> None:
    """Multiply all gradients by `factor`, in place."""
    if factor != 1.0:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
