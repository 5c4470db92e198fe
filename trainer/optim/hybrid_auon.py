"""Hybrid-AuON (arXiv 2509.24320): some Newton-Schulz steps on the momentum of a matrix, then AuON's normalization.

One step with Muon's triple in the paper, five in the released code. As in `trainer.optim.auon`, only `unit-rms` makes the brake
act: in the other modes the update is, to rounding, what the steps made of the momentum.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim import auon, matrix
from trainer.optim.auon import Mode
from trainer.optim.options import MomentumOptions
from trainer.optim.polar import (
    CoefficientName,
    Form,
    Precision,
    Schedule,
    aligned,
    overshoot,
    polar,
    precision,
    scaled_or_zero,
    schedule,
    squares,
    transport,
    unsound,
    wide,
)
from trainer.optim.polar import reference as reference_polar
from trainer.optim.requests import Whole
from trainer.registry import lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options(MomentumOptions):
    """Hybrid-AuON on hidden matrices, AdamW on the rest."""

    name: Literal["hybrid_auon"] = "hybrid_auon"
    steps: Annotated[int, Field(ge=1)] = 1
    """Newton-Schulz steps: the first ones that `polar` has."""
    mode: Mode = "paper"
    """What divides X, the momentum after its steps: `paper` rms(cosh X), `released` rms(cosh(1.5 X / |X|)). `unit-rms`: Z = X /
    rms(X), 0.2 Z rms(cosh N) / rms(cosh Z) with N normal."""
    polar: CoefficientName = "simple"
    """Coefficients of the Newton-Schulz steps."""
    polar_dtype: Precision = "auto"
    """Precision of the Newton-Schulz products; auto: fp16 on CUDA, bf16 on a CPU with bf16 matrix units, else fp32."""
    polar_form: Form = "standard"
    """`gram` iterates the Gram matrix instead, in fp32: fewer products where one side is over twice the other."""


def first_steps(group: dict[str, Any]) -> Schedule:
    """The schedule, cut.

    Raises:
        ValueError: fewer than 1 step, or more than the schedule has.
    """
    safety, steps = schedule(group["polar"])
    if not 1 <= group["steps"] <= len(steps):
        raise ValueError(f"steps is {group['steps']}, and {group['polar']} has {len(steps)}; give 1 to that")
    return safety, steps[: group["steps"]]


@cache
def first_overshoot(polar: CoefficientName, steps: int) -> float:
    """The largest singular value that the first steps make: of a schedule that is cut short, up to twice as much as in the end."""
    safety, whole = schedule(polar)
    return overshoot((safety, whole[:steps]))


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the parameter's layout, fp32.

    Raises:
        ValueError: more steps than the schedule has.
    """
    first_steps(group)
    return {"momentum": matrix.zeros_like(parameter)}


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Whole, list[list[Any]], None]:
    """One step on local shards; see `Options` for U.

    M <- b1 M + (1-b1) G;  X = NS_k(M);  W <- W - lr wd W - lr U
    """
    ahead, mode = matrix.advance(state["momentum"], gradients, group), group["mode"]
    dtype = precision(group["polar_dtype"], weights[0].device)
    most = first_overshoot(group["polar"], group["steps"])

    def direction(u: Any) -> tuple[tuple[Any], Any]:  # (N, m, n)
        x = polar(u, first_steps(group), dtype, group["polar_form"])
        size = squares(x, -1).sum(dim=(-2, -1), keepdim=True, dtype=torch.float64)  # (N, 1, 1)
        bad = unsound(size, x.shape, max(1.0, most))
        inverse = torch.where(auon.sound(size), (size / (x[0].numel() if mode == "unit-rms" else 1)).rsqrt(), 0.0)
        before = {"paper": torch.ones_like(inverse), "released": auon.RELEASED_GAIN * inverse, "unit-rms": inverse}[
            mode
        ]
        entries = aligned(
            x.to(wide(x)) * before.to(wide(x))
        )  # else sinh of an entry would depend on its place in the batch
        excess = (
            entries.sinh_().square_().sum(-1, keepdim=True).sum(-2, keepdim=True, dtype=torch.float64) / x[0].numel()
        )
        factor = auon.braked(inverse if mode == "unit-rms" else 1.0, excess, mode)
        return (scaled_or_zero(x, factor.to(wide(x)), bad),), bad.flatten()

    (steps,) = yield Whole(direction, (ahead,), ("matrix",), (transport(dtype),))
    matrix.apply(weights, steps, group)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    b = group["momentum"]
    m = b * state["momentum"] + (1 - b) * g
    x = reference_polar(b * m + (1 - b) * g if group["nesterov"] else m, first_steps(group))
    step = x / x.cosh().square().mean().sqrt() if group["mode"] == "paper" else auon.reference_update(x, group["mode"])
    return matrix.reference_apply(w, step, group), {"momentum": m}
