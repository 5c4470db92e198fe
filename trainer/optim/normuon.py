"""NorMuon (arXiv 2510.05491): orthogonalized momentum, every row divided by the root of its running mean square.

The row statistics travel with the matrix, so that the whole rule after the momentum sees whole matrices: the update is
the same to the bit on any number of ranks, and its norm is exact, never that of a shard.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim.adamw import Options as AdamWOptions
from trainer.optim.polar import polar
from trainer.optim.requests import Whole
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options:
    """NorMuon on hidden matrices, AdamW on the rest."""

    __pydantic_config__ = STRICT
    name: Literal["normuon"] = "normuon"
    lr: Annotated[float, Field(ge=0)] = 2e-3
    """Learning rate; every entry of an update has root mean square `scale * lr`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the momentum (an exponential average of gradients)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the rows' mean squares."""
    nesterov: bool = False
    """Orthogonalize the momentum one step ahead."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of a row's mean square."""
    scale: Annotated[float, Field(gt=0)] = 0.2
    """Root mean square of an update at lr = 1 (0.2 matches AdamW)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay per step, times the learning rate."""
    polar: Literal["polar-express", "quintic", "simple"] = "polar-express"
    """Coefficients of the Newton-Schulz steps."""
    polar_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the Newton-Schulz products; auto: fp16 on CUDA, bf16 on a CPU with bf16 matrix units, else fp32."""
    adamw: AdamWOptions = AdamWOptions(lr=3e-3)
    """The rule for embeddings, head, norms and biases."""


def init_state(parameter: Any) -> dict[str, Any]:
    """Momentum in the parameter's layout, mean squares (..., m, 1) in the layout of its rows; both fp32."""
    momentum = torch.zeros_like(parameter, dtype=torch.float32)
    rows = momentum[..., :1].clone() if not hasattr(momentum, "placements") else row_zeros(momentum)
    return {"momentum": momentum, "row_square": rows}


def row_zeros(parameter: Any) -> Any:
    """fp32 zeros (..., m, 1): sharded like the rows, replicated where the columns are sharded."""
    tensor = lazy("torch.distributed.tensor")
    last = parameter.ndim - 1
    placements = [tensor.Replicate() if p.is_shard(last) else p for p in parameter.placements]
    shape = (*parameter.shape[:-1], 1)
    return tensor.zeros(shape, dtype=torch.float32, device_mesh=parameter.device_mesh, placements=placements)


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Whole, list[list[Any]], None]:
    """One step on local shards.

    M <- b1 M + (1-b1) G;  O = polar(M);  v <- b2 v + (1-b2) rowmean(O^2);  H = O / (sqrt(v) + eps)
    W <- W - lr wd W - lr scale sqrt(m n) / ||H||_F H                          (Algorithm 1)
    """
    momentum, row_square = state["momentum"], state["row_square"]
    torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
    ahead = torch._foreach_lerp(momentum, gradients, 1 - group["momentum"]) if group["nesterov"] else momentum
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[group["polar_dtype"]]

    def direction(u: Any, v: Any) -> tuple[Any, Any]:  # (N, m, n), (N, m, 1)
        o = polar(u, group["polar"], dtype).float()
        v = v.lerp(o.square().mean(-1, keepdim=True), 1 - group["beta2"])
        h = o / (v.sqrt() + group["eps"])
        norm = h.square().sum(dim=(-2, -1), keepdim=True).sqrt()
        # A zero matrix stays zero: 0 / 0 would be the NaN of a layer that has not had a gradient yet.
        return h * (group["scale"] * (u.shape[-2] * u.shape[-1]) ** 0.5 / norm.clamp_min(1e-8)), v

    steps, squares = yield Whole(direction, (ahead, row_square))
    torch._foreach_copy_(row_square, squares)
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(weights, steps, alpha=-group["lr"])
