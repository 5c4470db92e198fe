"""What all matrix rules do alike on local shards: momentum, scale, decay, the layout of their statistics."""

from __future__ import annotations

import math
from typing import Any

from trainer.optim.polar import scaled_or_zero, squares, unsound, wide
from trainer.registry import lazy

torch: Any = lazy("torch")
distributed_tensor: Any = lazy("torch.distributed.tensor")


def state_dtype(parameter: Any) -> Any:
    """fp32, whatever the parameter's dtype: a second moment in bf16 stalls. fp64 for fp64 parameters."""
    return torch.promote_types(parameter.dtype, torch.float32)


def zeros_like(parameter: Any) -> Any:
    """Zeros in the parameter's layout."""
    return torch.zeros_like(parameter, dtype=state_dtype(parameter))


def zero_statistics(parameter: Any, kind: str, blocks: int = 1) -> Any:
    """Zeros for one value per row (..., m, 1), or per column of each block (..., blocks, n): sharded like the parameter,
    replicated along the dimension that they lack."""
    rows, columns = parameter.shape[-2:]
    shape = (*parameter.shape[:-2], *((rows, 1) if kind == "rows" else (blocks, columns)))
    lacking = parameter.ndim - (1 if kind == "rows" else 2)
    if not hasattr(parameter, "placements"):
        return torch.zeros(shape, dtype=state_dtype(parameter), device=parameter.device)
    placements = [distributed_tensor.Replicate() if p.is_shard(lacking) else p for p in parameter.placements]
    mesh = parameter.device_mesh
    return distributed_tensor.zeros(shape, dtype=state_dtype(parameter), device_mesh=mesh, placements=placements)


def advance(momentum: list[Any], gradients: list[Any], group: dict[str, Any]) -> list[Any]:
    """M <- b M + (1-b) G in place; returns what is to be orthogonalized: M, or b M + (1-b) G under Nesterov."""
    gradients = [g if g.dtype == m.dtype else g.to(m.dtype) for g, m in zip(gradients, momentum, strict=True)]
    torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
    return torch._foreach_lerp(momentum, gradients, 1 - group["momentum"]) if group["nesterov"] else momentum


def scale(family: str, rows: int, columns: int) -> float:
    """What a polar factor of (rows x columns) is multiplied by, times the learning rate."""
    if family == "rms":
        return 0.2 * math.sqrt(max(rows, columns))  # an exact factor has squared norm min(rows, columns)
    return math.sqrt(rows / columns) if family == "spectral" else math.sqrt(max(1.0, rows / columns))


def scaled_if_sound(o: Any, family: str) -> tuple[tuple[Any], Any]:
    """Polar factors (N, m, n), in place, times their scale; zeros for those that are unsound, and which these are (N,)."""
    bad = unsound(squares(o, -1).sum(dim=(-2, -1), keepdim=True), o.shape)  # (N, 1, 1)
    factor = torch.full(bad.shape, scale(family, *o.shape[-2:]), dtype=wide(o), device=o.device)
    return (scaled_or_zero(o, factor, bad),), bad.flatten()


def apply(weights: list[Any], steps: list[Any], group: dict[str, Any], factors: list[Any] | None = None) -> None:
    """W <- W - lr wd W - lr f S, in place; cautious: the decay only where S and W have one sign. f: factors >= 0 that fit
    the rows or the whole of S, 1 without.

    bf16 weights are rounded once: by itself a decay below 2^-9 would be rounded away.
    """
    decay = group["lr"] * group["weight_decay"]
    wide = [w.to(state_dtype(w)) for w in weights]
    if decay and group["cautious"]:
        shrunk = [torch.where(w * s > 0, w, 0.0) for w, s in zip(wide, steps, strict=True)]
        torch._foreach_add_(wide, shrunk, alpha=-decay)
    elif decay:
        torch._foreach_mul_(wide, 1 - decay)
    for weight, target, step, factor in zip(weights, wide, steps, factors or [None] * len(steps), strict=True):
        if factor is None:
            target.add_(step, alpha=-group["lr"])  # a foreach of two dtypes does the same, more slowly
        else:
            target.addcmul_(step, factor, value=-group["lr"])
        if weight is not target:
            weight.copy_(target)


def reference_apply(w: Any, step: Any, group: dict[str, Any]) -> Any:
    """`apply` for one whole matrix in float64."""
    mask = (w.sign() == step.sign()).double() if group["cautious"] else 1.0
    return w - group["lr"] * group["weight_decay"] * mask * w - group["lr"] * step
