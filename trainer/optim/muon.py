"""Muon (Jordan et al.; arXiv 2502.16982 for the rms scale): the momentum of a matrix, orthogonalized."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

from trainer.optim import matrix
from trainer.optim.options import MatrixOptions
from trainer.optim.polar import polar, precision, transport
from trainer.optim.polar import reference as reference_polar
from trainer.optim.requests import Whole


@dataclass(frozen=True, kw_only=True)
class Options(MatrixOptions):
    """Muon on hidden matrices, AdamW on the rest."""

    name: Literal["muon"] = "muon"


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the parameter's layout, fp32."""
    return {"momentum": matrix.zeros_like(parameter)}


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Whole, list[list[Any]], None]:
    """One step on local shards.

    M <- b1 M + (1-b1) G;  O = polar(M);  W <- W - lr wd W - lr scale(m, n) O
    """
    ahead = matrix.advance(state["momentum"], gradients, group)
    dtype = precision(group["polar_dtype"], weights[0].device)

    def direction(u: Any) -> tuple[tuple[Any], Any]:  # (N, m, n)
        o = polar(u, group["polar"], dtype, group["polar_form"], group["polar_prescale"])
        return matrix.scaled_if_sound(o, group["scale"])

    (steps,) = yield Whole(direction, (ahead,), ("matrix",), (transport(dtype),))
    matrix.apply(weights, steps, group)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    b = group["momentum"]
    m = b * state["momentum"] + (1 - b) * g
    o = reference_polar(b * m + (1 - b) * g if group["nesterov"] else m, group["polar"], group["polar_prescale"])
    step = o * matrix.scale(group["scale"], *w.shape)
    return matrix.reference_apply(w, step, group), {"momentum": m}
