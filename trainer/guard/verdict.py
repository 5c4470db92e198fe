"""One small all-reduce per step: what any rank saw, all ranks know, and all act alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import digest, same, sum_over_ranks, world
from trainer.outcome import Outcome


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
    saved: bool
    """Whether a save behind the run's back is complete on all ranks."""
    rejected: int
    """Matrices whose update the optimizer rejected in the step before, over all ranks."""
    parts: tuple[float, ...] = ()
    """Means over the step's global tokens of what the loss is made of, where it is made of several."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def agree(
    gradients: list[tuple[Tensor, int]], loss_sum: float, tokens: int, expected: int, *, signal: bool, timeout: bool, save_due: bool,
    saved: bool, rejected: int, device: torch.device, facts: Mapping[str, object] | None = None, parts: Sequence[float] = (),
) -> Verdict:  # fmt: skip
    """Reduce this rank's sums and flags, and make sure that the ranks are about to do the same step.

    Args:
        gradients: this rank's share of the gradients of `loss_sum / expected`, each with the number of ranks that hold a
            copy of it.
        parts: this rank's sums of what `loss_sum` is made of.
        facts: what must be the same on all ranks, such as learning rates; a digest of it travels with the sums.

    Raises:
        RunError: the ranks have different facts; on all of them.
    """
    mark = digest(facts or {})
    square = float(local_square(gradients))
    numbers = [
        loss_sum,
        float(tokens),
        square,
        float(signal),
        float(timeout),
        float(save_due),
        float(saved),
        float(rejected),
    ]
    total, count, square, signals, timeouts, saves, complete, refused, marks, squared_marks, *shares = sum_over_ranks(
        [*numbers, mark, mark * mark, *parts], device
    )
    if int(squared_marks) * world() != int(marks) ** 2:  # sums of whole numbers are exact; equal ones have no variance
        same(facts or {}, "this step", Outcome.BUG)
    ratio = expected / max(count, 1.0)
    return Verdict(
        loss=total / max(count, 1.0),
        tokens=int(count),
        gradient_norm=math.sqrt(square) * ratio if square >= 0 else math.nan,
        ratio=ratio,
        stop=_why(signals, timeouts),
        save_due=saves > 0,
        saved=complete == world(),
        rejected=int(refused),
        parts=tuple(share / max(count, 1.0) for share in shares),
    )


def agree_to_stop(*, signal: bool, timeout: bool, device: torch.device) -> str:
    """Why the run should save and end now, as any rank knows; empty if it should go on."""
    return _why(*sum_over_ranks([float(signal), float(timeout)], device))


def _why(signals: float, timeouts: float) -> str:
    return "a signal came" if signals else "train.time_limit is reached" if timeouts else ""


@torch.no_grad()
def local_square(gradients: list[tuple[Tensor, int]]) -> Tensor:
    """This rank's part of the squared gradient norm, float64: what several ranks hold is divided by their number."""
    total = torch.zeros((), dtype=torch.float64)
    for copies in sorted({copies for _, copies in gradients}):
        norms = torch._foreach_norm([tensor for tensor, number in gradients if number == copies])
        total = total + torch.stack([norm.double() for norm in norms]).square().sum().cpu() / copies
    return total
