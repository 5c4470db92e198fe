"""ROOT (arXiv 2511.20626): Muon on momentum without its outliers, by coefficients that depend on the shape.

The paper writes the clipping as M - softthreshold(M, t), which is clamp(M, -t, t). It is done where the matrix is whole, so
that t is a quantile of the matrix and never of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim import matrix
from trainer.optim.options import MatrixOptions
from trainer.optim.polar import CoefficientName, polar, precision, transport
from trainer.optim.polar import reference as reference_polar
from trainer.optim.requests import Whole
from trainer.optim.root_tables import for_shape
from trainer.registry import lazy

torch: Any = lazy("torch")

BINS = 1024  # per factor of two: a threshold is at most 0.1% above the quantile
OCTAVES = 16  # below the largest entry; what is smaller counts as one bin


@dataclass(frozen=True, kw_only=True)
class Options(MatrixOptions):
    """ROOT on hidden matrices, AdamW on the rest."""

    name: Literal["root"] = "root"
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Quantile of the magnitudes that larger entries are clipped to; 1 clips nothing."""
    clip: Literal["always", "outliers"] = "always"
    """`always` clips every matrix (the paper); `outliers` only one whose largest entry is over `outlier` times that
    quantile."""
    outlier: Annotated[float, Field(ge=1)] = 6.0
    """Largest entry over the quantile from which `clip: outliers` clips; of Gaussian entries it is 2.5 to 3.3."""
    polar: CoefficientName | Literal["fitted", "published"] = "fitted"  # type: ignore[assignment]
    """Coefficients of the Newton-Schulz steps: `fitted` by this project for the aspect ratio of a matrix, the paper's
    `published` triples for the four shapes that have one, or those of a name."""


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the parameter's layout, fp32.

    Raises:
        ValueError: an option out of range, or a shape without published coefficients.
    """
    if not 0 < group["quantile"] <= 1:
        raise ValueError(f"quantile is {group['quantile']}; use more than 0 and at most 1 (1 clips nothing)")
    if not group["outlier"] >= 1:
        raise ValueError(f"outlier is {group['outlier']}; use 1 or more: it is a multiple of the quantile")
    for rows in group["blocks"] or [parameter.shape[-2]]:
        for_shape(group["polar"], rows, parameter.shape[-1])
    return {"momentum": matrix.zeros_like(parameter)}


INFINITE = 0x7F800000  # the bits of an infinite fp32; a NaN has more


def threshold(u: Any, q: float) -> Any:
    """The q-quantile of the magnitudes of each matrix, rounded up by at most 0.1%: (N, m, n) -> (N, 1, 1), fp32.

    One histogram over the leading bits of the fp32 representation, which bins by logarithm; no sort. A quantile more
    than 2^16 below the largest entry is reported as 2^-16 of that, that of a matrix that is not finite as NaN: a clamp would
    hide the matrix's sickness.
    """
    size, bins = u[0].numel(), BINS * OCTAVES
    bits = u.float().abs().flatten(1).view(torch.int32).bitwise_right_shift_(13)  # exponent and 10 bits of the mantissa
    top = bits.amax(1, keepdim=True)
    bits.sub_(top - (bins - 1)).clamp_(0, bins - 1)
    bits += bins * torch.arange(len(u), device=u.device, dtype=torch.int32).unsqueeze(1)
    counts = _counts(bits.flatten(), bins * len(u)).view(len(u), bins).cumsum(1)
    chosen = (counts < math.ceil(q * size)).sum(1, keepdim=True)  # the first bin that holds the quantile
    edge = (chosen - bins + 2 + top).clamp_(min=0).to(torch.int32) << 13  # where the next one begins
    return torch.where(top < INFINITE >> 13, edge.view(torch.float32), math.nan).unsqueeze(-1)


def _counts(values: Any, size: int) -> Any:
    """How often each of `size` whole numbers occurs. bincount would wait for a CUDA device."""
    if not values.is_cuda:
        return torch.bincount(values, minlength=size)
    one = torch.ones((), dtype=torch.int32, device=values.device)
    return torch.zeros(size, dtype=torch.int32, device=values.device).scatter_add_(
        0, values.long(), one.expand(values.shape)
    )


def clipped(u: Any, group: dict[str, Any]) -> Any:
    """The matrices (N, m, n) with entries clamped to the quantile, itself rounded to their dtype; see `Options`."""
    if group["quantile"] == 1:
        return u
    limit = threshold(u, group["quantile"]).to(u.dtype)
    if group["clip"] == "outliers":
        most = u.abs().amax(dim=(-2, -1), keepdim=True)
        limit = torch.where(most > group["outlier"] * limit, limit, most)
    return u.clamp(-limit, limit)


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Whole, list[list[Any]], None]:
    """One step on local shards.

    M <- b1 M + (1-b1) G;  B = clamp(M, -t, t), t = quantile(|M|, q);  W <- W - lr wd W - lr scale(m, n) polar(B)
    """
    ahead = matrix.advance(state["momentum"], gradients, group)
    dtype = precision(group["polar_dtype"], weights[0].device)

    def direction(u: Any) -> tuple[tuple[Any], Any]:  # (N, m, n)
        coefficients = for_shape(group["polar"], *u.shape[-2:])
        o = polar(clipped(u, group), coefficients, dtype, group["polar_form"], group["polar_prescale"])
        return matrix.scaled_if_sound(o, group["scale"])

    (steps,) = yield Whole(direction, (ahead,), ("matrix",), (transport(dtype),))
    matrix.apply(weights, steps, group)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    b = group["momentum"]
    m = b * state["momentum"] + (1 - b) * g
    u = b * m + (1 - b) * g if group["nesterov"] else m
    ordered = u.abs().flatten().sort().values
    fraction, exponent = torch.frexp(ordered[math.ceil(group["quantile"] * u.numel()) - 1])
    edge = torch.ldexp(((fraction * 2 * BINS).floor() + 1) / (2 * BINS), exponent)
    ordinary = group["clip"] == "outliers" and ordered[-1] <= group["outlier"] * edge
    limit = ordered[-1] if ordinary or group["quantile"] == 1 else edge
    u = u.sign() * torch.minimum(u.abs(), limit)
    o = reference_polar(u, for_shape(group["polar"], *w.shape), group["polar_prescale"])
    return matrix.reference_apply(w, o * matrix.scale(group["scale"], *w.shape), group), {"momentum": m}
