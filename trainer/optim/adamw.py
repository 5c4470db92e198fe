"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) by torch's fused kernel on local shards, with fp32 moments.

As an optimizer of its own, and as the rule for what is never orthogonalized: embeddings, head, norms, biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
adamw: Any = lazy("torch.optim.adamw")


@dataclass(frozen=True, kw_only=True)
class Options:
    """AdamW on every parameter."""

    __pydantic_config__ = STRICT
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(ge=0)] = 1e-3
    """Learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay per step, times the learning rate; never of norms, biases or embeddings."""
    tau_epochs: Annotated[float, Field(gt=0)] | None = None
    """The decay as a time instead: weight_decay = 1 / (lr * tau_epochs * steps of an epoch)."""
    decay_head: bool = False
    """Let the head decay, too; one that shares its weights with the embeddings cannot."""


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Two moments in the parameter's layout, fp32 (fp64 for fp64), and the step count (fp32: a bf16 count sticks at 256)."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
    }


def update(weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]) -> None:
    """One step on local shards; needs nothing from other ranks."""
    # The kernel wants one dtype: bf16 weights are widened for the step and rounded after it.
    wide = [w.to(m.dtype) for w, m in zip(weights, state["exp_avg"], strict=True)]
    adamw.adamw(
        wide, [g.to(w.dtype) for g, w in zip(gradients, wide, strict=True)], state["exp_avg"], state["exp_avg_sq"], [],
        state["step"], fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["beta1"],
        beta2=group["beta2"], eps=group["eps"], weight_decay=group["weight_decay"],
    )  # fmt: skip
    for weight, result in zip(weights, wide, strict=True):
        if weight is not result:
            weight.copy_(result)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole parameter in float64, as the tests compare with: (new weight, new state)."""
    b1, b2, t = group["beta1"], group["beta2"], state["step"].double() + 1
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
    w = w - group["lr"] * group["weight_decay"] * w - group["lr"] * update
    return w, {"exp_avg": m, "exp_avg_sq": v, "step": t}
