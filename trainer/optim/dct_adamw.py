"""DCT-AdamW (arXiv 2505.17967): AdamW on a few columns of each gradient in a cosine basis; the state is as small as they.

The columns are chosen anew every `refresh` steps. All of them come from one orthogonal basis, so the moments are rotated
to the new choice by moving those of columns that stay. Columns that are new begin at zero, with an age of their own in
the bias correction: with that of the run their first step would be several times too large.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.optim import dct, feedback
from trainer.optim.dct import reference_basis
from trainer.optim.feedback import Feedback
from trainer.optim.low_rank import (
    LowRankOptions,
    Piece,
    best,
    by_parameter,
    cut_of,
    indices,
    taken,
    three,
    turned,
    zeros,
)
from trainer.optim.low_rank import whole_bytes as whole_bytes
from trainer.optim.requests import Expand, Request
from trainer.optim.sides import Cut
from trainer.registry import lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options(LowRankOptions):
    """DCT-AdamW on hidden matrices, AdamW on the rest."""

    name: Literal["dct_adamw"] = "dct_adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    refresh: Annotated[int, Field(ge=1)] = 1
    """Steps from one choice of columns to the next."""
    error_feedback: Feedback = "none"
    """How what was left out of a gradient is kept and added to the next: not at all, in fp32, in 8 bits, or in 4."""


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Two moments (..., l, r) in fp32, cut along l; indices and ages of the kept columns (r,) int64, on every rank; the
    step count on the host, which decides by it; and what the error feedback keeps, (..., l, s) cut along l.

    Raises:
        ValueError: a rank that does not fit.
    """
    cut, form = cut_of(parameter.shape, group), group["error_feedback"]
    state = {
        "exp_avg": zeros(parameter, cut, cut.width),
        "exp_avg_sq": zeros(parameter, cut, cut.width),
        "indices": indices(parameter, cut),
        "ages": indices(parameter, cut),
        "step": torch.zeros((), dtype=torch.float32),
    }
    if form == "fp32":
        state["feedback"] = zeros(parameter, cut, cut.short)
    elif form != "none":
        state["feedback"] = zeros(parameter, cut, sum(feedback.width(s, form) for s in shorts(cut)), torch.uint8)
        state["feedback_range"] = zeros(parameter, cut, 2 * len(shorts(cut)))
    return state


def reduced(shape: Sequence[int], group: dict[str, Any]) -> float:
    """Float64 numbers that a step adds up over the shards of a parameter, on the mean: a score per column."""
    return sum(b.short[1] - b.short[0] for b in cut_of(shape, group).blocks) / group["refresh"]


def shorts(cut: Cut) -> list[int]:
    """The short sides that lie beside each other in the long layout."""
    return [b - a for a, b in (block.short for block in cut.blocks)] if cut.turned else [cut.short]


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Request, Any, None]:
    """One step on local shards, with A (l, s) the gradient in the long layout and Q_r (r, s) the kept basis vectors.

    A <- G + X;  every `refresh` steps: indices <- best columns of A Q^T, moments rotated;  a = A Q_r^T;  X <- A - a Q_r
    m <- b1 m + (1-b1) a;  v <- b2 v + (1-b2) a^2;  W <- W - lr wd W - lr m / (1-b1^age) / (sqrt(v / (1-b2^age)) + eps) Q_r
    """
    cuts = [cut_of(shape, group) for shape in group["shapes"]]
    values, pieces = yield from turned(gradients, cuts)
    entries = [restored(piece, cuts[piece.parameter], state, group, piece.entries(values)) for piece in pieces]
    due = int(state["step"][0].numpy()) % group["refresh"] == 0  # on the host: nothing waits for a device
    torch._foreach_add_(state["step"], 1.0)
    if due:
        spectra = [dct.coefficients(a, group["transform"]) for a in entries]
        chosen = yield from best(spectra, pieces, group["norm"])
        for piece, new in zip(pieces, chosen, strict=True):
            reselect(piece, new, state)
        factors = [taken(spectrum, new) for spectrum, new in zip(spectra, chosen, strict=True)]
        del spectra
    kept = [
        dct.vectors(piece.kept(state["indices"]), a.shape[-1], a.dtype)
        for piece, a in zip(pieces, entries, strict=True)
    ]
    if not due:
        factors = [a @ rows.mT for a, rows in zip(entries, kept, strict=True)]
    results = [torch.empty_like(three(m)) for m in state["exp_avg"]]
    for piece, a, factor, rows in zip(pieces, entries, factors, kept, strict=True):
        keep(piece, cuts[piece.parameter], state, group, a, factor, rows)
        piece.factor(results).copy_(step_of(piece, factor, state, group))
    yield Expand(
        weights, results, by_parameter(kept, pieces), cuts, 1 - group["lr"] * group["weight_decay"], -group["lr"]
    )


def reselect(piece: Piece, new: Any, state: dict[str, list[Any]]) -> None:
    """Take new columns (E_p, r) in place of the old: moments and ages of those that stay move along."""
    old, ages = piece.kept(state["indices"]), piece.kept(state["ages"])
    places, stayed = dct.moved(old, new)
    for key in ("exp_avg", "exp_avg_sq"):
        dct.rotate(piece.factor(state[key]), places, stayed)
    ages.copy_(torch.take_along_dim(ages, places, -1) * stayed)
    old.copy_(new)


def step_of(piece: Piece, a: Any, state: dict[str, list[Any]], group: dict[str, Any]) -> Any:
    """Advance the moments by a (E_p, l_p, r); the direction of the step, of that shape."""
    m, v, ages = piece.factor(state["exp_avg"]), piece.factor(state["exp_avg_sq"]), piece.kept(state["ages"])
    m.lerp_(a, 1 - group["beta1"])
    v.mul_(group["beta2"]).addcmul_(a, a, value=1 - group["beta2"])
    ages.add_(1)
    age = ages.double().unsqueeze(-2)  # (E_p, 1, r)
    first, second = ((1 / (1 - group[beta] ** age)).to(a.dtype) for beta in ("beta1", "beta2"))
    return (m * first).div_((v * second).sqrt_().add_(group["eps"]))


def restored(piece: Piece, cut: Cut, state: dict[str, list[Any]], group: dict[str, Any], a: Any) -> Any:
    """The entries (E_p, l_p, s) with what was left out of those before."""
    form = group["error_feedback"]
    if form == "none":
        return a
    if form == "fp32":
        return a + piece.entries(state["feedback"])
    codes, ranges = coded(piece, cut, state, form)
    return a + feedback.decode(codes, ranges, a.shape[-1], form)


def keep(
    piece: Piece, cut: Cut, state: dict[str, list[Any]], group: dict[str, Any], a: Any, factor: Any, rows: Any
) -> None:
    """Keep A - a Q_r, what the compression leaves out, for the next step."""
    form = group["error_feedback"]
    if form == "none":
        return
    rest = torch.baddbmm(a, factor, rows, alpha=-1)
    if form == "fp32":
        piece.entries(state["feedback"]).copy_(rest)
        return
    for target, value in zip(coded(piece, cut, state, form), feedback.encode(rest, form), strict=True):
        target.copy_(value)


def coded(piece: Piece, cut: Cut, state: dict[str, list[Any]], form: Feedback) -> tuple[Any, Any]:
    """The views of a piece's codes and ranges."""
    number = cut.blocks.index(piece.block) if cut.turned else 0
    widths = [feedback.width(s, form) for s in shorts(cut)]
    start = sum(widths[:number])
    codes, ranges = (three(state[key][piece.parameter])[:, piece.rows] for key in ("feedback", "feedback_range"))
    return codes[..., start : start + widths[number]], ranges[..., 2 * number : 2 * number + 2]


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state). Without 8 or 4 bits."""
    wide, b1, b2, new = w.shape[0] < w.shape[1], group["beta1"], group["beta2"], dict(state)
    a = (g.mT if wide else g) + state.get("feedback", 0.0)
    q, old = reference_basis(a.shape[1]), state["indices"]
    if state["step"] % group["refresh"] == 0:
        size = (a @ q.mT).abs() ** (2 if group["norm"] == "l2" else 1)
        new["indices"] = size.sum(0).topk(len(old)).indices.sort().values
    kept = q[new["indices"]]
    rotation = (q[old] @ kept.mT).round()  # zeros and ones; of old states that are all zero at first
    ages = state["ages"].double() @ rotation + 1
    small = a @ kept.mT
    m = b1 * state["exp_avg"] @ rotation + (1 - b1) * small
    v = b2 * (state["exp_avg_sq"] @ rotation).abs() + (1 - b2) * small**2
    if "feedback" in state:
        new["feedback"] = a - small @ kept
    step = m / (1 - b1**ages) / ((v / (1 - b2**ages)).sqrt() + group["eps"]) @ kept
    w = w - group["lr"] * group["weight_decay"] * w - group["lr"] * (step.mT if wide else step)
    return w, new | {"exp_avg": m, "exp_avg_sq": v, "ages": ages.long(), "step": state["step"] + 1}
