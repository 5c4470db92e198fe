"""Trion (arXiv 2505.17967, version 4): Muon on a few columns of the momentum in a cosine basis.

What is left out of an update stays in the momentum. Only the (l, r) factor is orthogonalized, through its r x r Gram
matrix: that is what ranks exchange, in place of whole matrices. In fp32 it would move the update by up to 1e-3, so it is
accumulated, added and iterated in float64.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim import dct, matrix
from trainer.optim.dct import reference_basis
from trainer.optim.low_rank import (
    LowRankOptions,
    added,
    best,
    by_parameter,
    cut_of,
    taken,
    three,
    turned,
    zeros,
)
from trainer.optim.low_rank import whole_bytes as whole_bytes
from trainer.optim.polar import CoefficientName, gram_polar, unsound
from trainer.optim.polar import reference as reference_polar
from trainer.optim.requests import Expand, Request
from trainer.registry import lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options(LowRankOptions):
    """Trion on hidden matrices, AdamW on the rest."""

    name: Literal["trion"] = "trion"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Share of the chosen columns that stays in the momentum after a step; of the others all of it stays."""
    scale: Literal["rms", "spectral", "shape"] = "rms"
    """What the orthogonal factor of an (m x n) matrix is multiplied by: `rms` 0.2 sqrt(max(m, n)), so that at full rank
    the entries of an update have root mean square 0.2; `spectral` sqrt(m/n); `shape` sqrt(max(1, m/n))."""
    polar: CoefficientName = "polar-express"
    """Coefficients of the Newton-Schulz steps."""


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the long layout (..., l, s), fp32, cut along l.

    Raises:
        ValueError: a rank that does not fit.
    """
    cut = cut_of(parameter.shape, group)
    return {"momentum": zeros(parameter, cut, cut.short)}


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Request, Any, None]:
    """One step on local shards, with B (l, s) in the long layout and Q_r (r, s) the best basis vectors for it.

    B = M + G;  b = B Q_r^T;  M <- B - (1-mu) b Q_r;  o = polar(b) = b f(b^T b);  W <- W - lr wd W - lr scale(m, n) o Q_r
    """
    cuts = [cut_of(shape, group) for shape in group["shapes"]]
    values, pieces = yield from turned(gradients, cuts)
    torch._foreach_add_([three(m) for m in state["momentum"]], values)
    del values
    entries = [piece.entries(state["momentum"]) for piece in pieces]
    spectra = [dct.coefficients(b, group["transform"]) for b in entries]
    chosen = yield from best(spectra, pieces, group["norm"])
    factors = [taken(spectrum, new) for spectrum, new in zip(spectra, chosen, strict=True)]  # (E_p, l_p, r)
    del spectra
    kept = [dct.vectors(new, b.shape[-1], b.dtype) for new, b in zip(chosen, entries, strict=True)]
    for b, factor, rows in zip(entries, factors, kept, strict=True):
        b.baddbmm_(factor, rows, alpha=group["momentum"] - 1)
    grams = yield from added([wide.mT @ wide for wide in (f.double() for f in factors)], pieces)  # (E_p, r, r)
    results = [three(m).new_empty(*three(m).shape[:2], c.width) for m, c in zip(state["momentum"], cuts, strict=True)]
    rejected = []
    for piece, factor, gram in zip(pieces, factors, grams, strict=True):
        right, square = gram_polar(gram, group["polar"])
        bad = unsound(square, (piece.block.rank,) * 2)  # (E_p, 1, 1)
        rejected.append(bad.flatten())
        right = (right * matrix.scale(group["scale"], *piece.shape)).to(factor.dtype)
        piece.factor(results).copy_(torch.where(bad, 0.0, factor @ right))
    keep, by = 1 - group["lr"] * group["weight_decay"], -group["lr"]
    yield Expand(weights, results, by_parameter(kept, pieces), cuts, keep, by, by_parameter(rejected, pieces))


def reduced(shape: Sequence[int], group: dict[str, Any]) -> float:
    """Float64 numbers that a step adds up over the shards of a parameter: a score per column, and r x r."""
    return sum(b.short[1] - b.short[0] + b.rank**2 for b in cut_of(shape, group).blocks)


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    wide = w.shape[0] < w.shape[1]
    b = state["momentum"] + (g.mT if wide else g)
    q = reference_basis(b.shape[1])
    size = (b @ q.mT).abs() ** (2 if group["norm"] == "l2" else 1)
    rank = group["rank"] if group["rank"] >= 1 else max(1, int(group["rank"] * b.shape[1]))
    kept = q[size.sum(0).topk(rank).indices]
    small = b @ kept.mT
    left_out = b - small @ kept
    step = reference_polar(small, group["polar"]) @ kept * matrix.scale(group["scale"], *w.shape)
    w = w - group["lr"] * group["weight_decay"] * w - group["lr"] * (step.mT if wide else step)
    return w, {"momentum": group["momentum"] * b + (1 - group["momentum"]) * left_out}
