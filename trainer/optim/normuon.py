"""NorMuon (arXiv 2510.05491): orthogonalized momentum, every row divided by the root of its running mean square.

The row statistics travel with the matrix, so that the whole rule after the momentum sees whole matrices: the update is
the same to the bit on any number of ranks, and its norm is exact, never that of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim import matrix
from trainer.optim.options import MatrixOptions
from trainer.optim.polar import polar, precision, scaled_or_zero, squares, transport, unsound
from trainer.optim.polar import reference as reference_polar
from trainer.optim.requests import Whole
from trainer.registry import lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options(MatrixOptions):
    """NorMuon on hidden matrices, AdamW on the rest."""

    name: Literal["normuon"] = "normuon"
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean squares."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of a mean square."""
    axis: Literal["rows", "longer"] = "rows"
    """What is normalized: rows (outputs), or the longer of rows and columns."""
    restore: Literal["exact", "norm"] = "exact"
    """Norm of the update before scaling: that of an exact polar factor (the paper), or that of the computed one."""


def _kind(shape: tuple[int, ...], axis: str, blocks: list[int]) -> str:
    kinds = {"rows" if axis == "rows" or rows >= shape[-1] else "columns" for rows in blocks or [shape[-2]]}
    if len(kinds) > 1:
        raise ValueError(
            f"axis 'longer' means rows for some blocks {blocks} of {tuple(shape)}, columns for others; use 'rows'"
        )
    return kinds.pop()


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the parameter's layout, mean squares in that of its rows (..., m, 1) or columns; fp32."""
    kind = _kind(parameter.shape, group["axis"], group["blocks"])
    statistics = matrix.zero_statistics(parameter, kind, max(len(group["blocks"]), 1))
    return {"momentum": matrix.zeros_like(parameter), "mean_square": statistics}


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Whole, list[list[Any]], None]:
    """One step on local shards.

    M <- b1 M + (1-b1) G;  O = polar(M);  v <- b2 v + (1-b2) rowmean(O^2);  H = O / (sqrt(v) + eps)
    W <- W - lr wd W - lr scale(m, n) sqrt(min(m, n)) / ||H||_F H                         (Algorithm 1)
    """
    ahead = matrix.advance(state["momentum"], gradients, group)
    dtype = precision(group["polar_dtype"], weights[0].device)

    def direction(u: Any, v: Any) -> tuple[tuple[Any, Any], Any]:  # (N, m, n), (N, m, 1) or (N, 1, n)
        o = polar(u, group["polar"], dtype, group["polar_form"], group["polar_prescale"])
        along = -1 if kind == "rows" else -2
        square = squares(o, along)
        total = square.sum(dim=(-2, -1), keepdim=True)  # ||O||^2
        bad = unsound(total, u.shape)
        v = torch.where(bad, v, v.lerp((square / u.shape[along]).to(v.dtype), 1 - group["beta2"]))
        inverse = 1 / (v.sqrt() + group["eps"])
        norm = (square * inverse.square()).sum(dim=(-2, -1), keepdim=True).sqrt()  # ||H||, without a second pass over O
        target = total.sqrt() if group["restore"] == "norm" else math.sqrt(min(u.shape[-2:]))
        # A zero matrix stays zero: 0 / 0 would be the NaN of a layer that has not had a gradient yet.
        factor = target * matrix.scale(group["scale"], *u.shape[-2:]) / norm.clamp_min(1e-8)
        return (scaled_or_zero(o, inverse * factor, bad), v), bad.flatten()

    # A bucket holds tall parameters or wide ones, never both: the first speaks for all.
    kind = _kind(group["shapes"][0], group["axis"], group["blocks"])
    request = Whole(
        direction, (ahead, state["mean_square"]), ("matrix", kind), (transport(dtype), state["mean_square"][0].dtype)
    )
    steps, mean_squares = yield request
    torch._foreach_copy_(state["mean_square"], mean_squares)
    matrix.apply(weights, steps, group)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    b = group["momentum"]
    m = b * state["momentum"] + (1 - b) * g
    o = reference_polar(b * m + (1 - b) * g if group["nesterov"] else m, group["polar"], group["polar_prescale"])
    along = -1 if _kind(w.shape, group["axis"], []) == "rows" else -2
    v = group["beta2"] * state["mean_square"] + (1 - group["beta2"]) * o.square().mean(along, keepdim=True)
    h = o / (v.sqrt() + group["eps"])
    target = o.norm() if group["restore"] == "norm" else min(w.shape) ** 0.5
    step = h * (target / h.norm().clamp_min(1e-8)) * matrix.scale(group["scale"], *w.shape)
    return matrix.reference_apply(w, step, group), {"momentum": m, "mean_square": v}
