"""The discrete cosine transform as a fixed orthogonal basis, and the choice of its best columns for a matrix.

Basis vector k of s is Q[k, j] = sqrt(2/s) cos(pi k (2j + 1) / (2s)), row 0 times sqrt(1/2): the DCT-II (Ahmed, Natarajan,
Rao 1974). One table per size is kept while the process lives; it is no state of an optimizer.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

from trainer.registry import lazy

torch: Any = lazy("torch")

Transform = Literal["auto", "fft", "matmul"]
Norm = Literal["l2", "l1"]
TIE = 28
"""Last bits of 52 of a score that are left out: equal in the others is equal, and the lower index is kept. Scores of shards add
up to those of the whole but for the last bits, so that ties do not depend on how a matrix is sharded."""


@cache
def basis(size: int, dtype: Any, device: Any) -> Any:
    """All basis vectors as rows, (s, s); computed in float64."""
    columns = 2 * torch.arange(size, dtype=torch.int64, device=device) + 1
    rows = torch.empty(size, size, dtype=dtype, device=device)
    for start in range(0, size, 256):  # some rows at a time in float64
        k = torch.arange(start, min(start + 256, size), dtype=torch.int64, device=device).unsqueeze(1)
        angle = (k * columns % (4 * size)).double() * (math.pi / (2 * size))  # exact before rounding
        rows[start : start + 256] = angle.cos_().mul_(math.sqrt(2 / size))
    rows[0] *= math.sqrt(0.5)
    return rows


@cache
def _fft_tables(size: int, dtype: Any, device: Any) -> tuple[Any, Any]:
    """The order in which the FFT reads a row, and the turns of its coefficients."""
    places = torch.arange(size, device=device)
    order = torch.cat([places[::2], places[1::2].flip(0)])
    k = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)
    turns = torch.polar(torch.full_like(k, math.sqrt(2 / size)), -math.pi * k / (2 * size))
    turns[0] *= math.sqrt(0.5)
    return order, turns.to(torch.promote_types(dtype, torch.complex64))


def coefficients(rows: Any, transform: Transform = "auto") -> Any:
    """The coefficients of every row in the basis, x Q^T.

    Args:
        rows: (..., l, s), fp32 or float64.
        transform: "matmul" multiplies by the table, 2 l s^2 operations. "fft" is Makhoul's algorithm (IEEE TASSP 28, 1980):
            one real FFT of s points per row, about 2.5 l s log2 s operations. "auto" takes the FFT on a CPU, where it is
            several times faster, and the product elsewhere. Their results differ by rounding.
    """
    size, device = rows.shape[-1], rows.device
    if transform == "matmul" or (transform == "auto" and device.type != "cpu"):
        return rows @ basis(size, rows.dtype, device).mT
    if not rows.numel():
        return rows.clone()
    order, turns = _fft_tables(size, rows.dtype, device)
    half = torch.fft.rfft(rows.index_select(-1, order)).mul_(turns)  # (..., l, s // 2 + 1)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    out[..., : size // 2 + 1] = half.real
    out[..., size // 2 + 1 :] = half.imag[..., 1 : (size + 1) // 2].flip(-1).neg_()  # by the symmetry of a real row
    return out


def scores(spectrum: Any, norm: Norm) -> Any:
    """What the rows (..., l, s) say for each column: the sum of squares or of magnitudes, float64 (..., s). Of shards it
    is a part of the sum over the whole matrix."""
    values = spectrum.square() if norm == "l2" else spectrum.abs()
    return values.sum(-2, dtype=torch.float64)


def choose(score: Any, count: int) -> Any:
    """The indices of the best columns, ascending: (..., count) int64 of scores (..., s)."""
    rough = (score.view(torch.int64) + (1 << (TIE - 1))) >> TIE  # in the order of the scores, as these are not negative
    best = rough.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best.sort(-1).values


def vectors(indices: Any, size: int, dtype: Any) -> Any:
    """The basis vectors of the indices (..., r) as rows, (..., r, s)."""
    return basis(size, dtype, indices.device)[indices]


def moved(old: Any, new: Any) -> tuple[Any, Any]:
    """Where the columns `new` (..., r) were among `old` (..., r): (places, whether they were there at all).

    Both choose from one orthogonal basis, so the product of the old basis and the new is a permutation with gaps: to
    rotate a state by it is to move the columns that stay, and to begin the others at zero.
    """
    same = new.unsqueeze(-1) == old.unsqueeze(-2)  # (..., r new, r old)
    return same.byte().argmax(-1), same.any(-1)


def rotate(state: Any, places: Any, stayed: Any) -> None:
    """Move the columns of a factor (E, l, r), in place."""
    new = torch.take_along_dim(state, places.unsqueeze(-2), -1)
    state.copy_(new.mul_(stayed.unsqueeze(-2)))


def reference_basis(size: int) -> Any:
    """The basis by its definition, slow and plain, float64 (s, s)."""
    rows = [[math.cos(math.pi * k * (2 * j + 1) / (2 * size)) for j in range(size)] for k in range(size)]
    scale = [math.sqrt((1 if k == 0 else 2) / size) for k in range(size)]
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor(scale, dtype=torch.float64).unsqueeze(1)
