"""AuON (arXiv 2509.24320): the momentum of a matrix over its norm, and over the root mean square of its hyperbolic cosines.

No matrix product: two numbers per matrix are added up over its shards. What it is worth, from the mathematics: the entries of
a matrix of norm 1 are so small that the mean of cosh^2 is 1 + 1/(mn): 2e-6 for 768 x 768 entries. In the paper's form AuON is
momentum over its Frobenius norm; in that of the released code it is momentum as it is. The brake that the paper describes
acts if the entries have root mean square 1 before it: `unit-rms`, a variant of ours.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.optim import matrix
from trainer.optim.options import MomentumOptions
from trainer.optim.requests import Sum
from trainer.registry import lazy

torch: Any = lazy("torch")

Mode = Literal["paper", "released", "unit-rms"]
RELEASED_GAIN = 1.5  # of the entries of a matrix of norm 1, in the released code
TOLERANCE = 1e-6  # relative, of an update: what AuON promises over any number of ranks
GAUSSIAN_BRAKE = math.sqrt((1 + math.e**2) / 2)  # root mean square of cosh over normal entries


@dataclass(frozen=True, kw_only=True)
class Options(MomentumOptions):
    """AuON on hidden matrices, AdamW on the rest."""

    name: Literal["auon"] = "auon"
    mode: Mode = "paper"
    """`paper`: X = M / |M|, the update X / rms(cosh X), of norm 1. `released`: M / rms(cosh 1.5 X), in truth M. `unit-rms`: Z =
    M / rms(M), 0.2 Z rms(cosh N) / rms(cosh Z) with N normal, so that normal entries move by 0.2 lr and few large ones
    brake all of their matrix."""


def init_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Momentum in the parameter's layout, fp32."""
    return {"momentum": matrix.zeros_like(parameter)}


def update(
    weights: list[Any], gradients: list[Any], state: dict[str, list[Any]], group: dict[str, Any]
) -> Generator[Sum, list[Any], None]:
    """One step on local shards; see `Options` for U.

    M <- b1 M + (1-b1) G;  W <- W - lr wd W - lr U
    """
    ahead, mode = matrix.advance(state["momentum"], gradients, group), group["mode"]
    sizes = yield Sum(ahead, power=2, mean=mode == "unit-rms", sound=True)
    usable = [sound(size) for size in sizes]
    inverse = [torch.where(ok, size.rsqrt(), 0.0) for ok, size in zip(usable, sizes, strict=True)]
    excess: list[Any] = [foreseen(shape, group) for shape in group["shapes"]]
    if None in excess:
        gain = RELEASED_GAIN if mode == "released" else 1.0
        entries = [torch.sinh(a * (gain * i).to(a.dtype)) for a, i in zip(ahead, inverse, strict=True)]
        found = yield Sum(entries, power=2, mean=True)
        excess = [f if e is None else e for f, e in zip(found, excess, strict=True)]  # the same in any bucket
    factors = [
        torch.where(ok, braked(1.0 if mode == "released" else i, e, mode), 0.0).to(a.dtype)
        for ok, a, i, e in zip(usable, ahead, inverse, excess, strict=True)
    ]
    steps = [zero_unless(ok, a) for ok, a in zip(usable, ahead, strict=True)]
    matrix.apply(weights, steps, group, factors)


def reduced(shape: Sequence[int], group: dict[str, Any]) -> float:
    """Most float64 numbers that a step adds up over the shards of a parameter: two per matrix, one where it is large."""
    return (1 if foreseen(shape, group) is not None else 2) * max(1, len(group["blocks"]))


def foreseen(shape: Sequence[int], group: dict[str, Any]) -> float | None:
    """The mean of sinh^2 of a large matrix of norm 1, without a pass over it, which would take longer than all the rest.

    Entries x with sum x^2 = 1 have c^2 <= sum sinh^2(c x) <= sinh^2(c): the left is that of many small ones, the right that of
    a single one. None where an update could differ by over `TOLERANCE` between the two, and under `unit-rms`.
    """
    if group["mode"] == "unit-rms" or len(group["blocks"]) > 1:
        return None
    gain, count = RELEASED_GAIN if group["mode"] == "released" else 1.0, shape[-2] * shape[-1]
    return gain**2 / count if (math.sinh(gain) ** 2 - gain**2) / (2 * count) <= TOLERANCE else None


def zero_unless(ok: Any, values: Any) -> Any:
    """Values, zero in matrices that are not `ok`. A CPU knows, and then spares the pass; a GPU would have to wait."""
    if values.device.type == "cpu" and ok.numpy().all():
        return values
    return torch.where(ok, values, 0.0)


def sound(size: Any) -> Any:
    """Whether a matrix of this sum of squares has a direction."""
    return (size > 0) & size.isfinite()


def braked(factor: Any, excess: Any, mode: Mode) -> Any:
    """A factor over rms(cosh), from the mean of sinh^2 = cosh^2 - 1; without entries to add up, exact for small ones."""
    return factor * (0.2 * GAUSSIAN_BRAKE if mode == "unit-rms" else 1.0) / (1 + excess) ** 0.5


def reference(w: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One step of one whole matrix in float64, as the tests compare with: (new weight, new state)."""
    b = group["momentum"]
    m = b * state["momentum"] + (1 - b) * g
    u = b * m + (1 - b) * g if group["nesterov"] else m
    return matrix.reference_apply(w, reference_update(u, group["mode"]), group), {"momentum": m}


def reference_update(u: Any, mode: Mode) -> Any:
    """U of the momentum, whole and in float64."""
    if mode == "unit-rms":
        z = u / u.square().mean().sqrt()
        return 0.2 * math.sqrt((1 + math.exp(2)) / 2) * z / z.cosh().square().mean().sqrt()
    x = u / u.norm()
    if mode == "paper":
        return x / x.cosh().square().mean().sqrt()
    return u / (1.5 * x).cosh().square().mean().sqrt()
