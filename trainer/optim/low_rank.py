"""What the low-rank rules do alike: their options, the layout of their state, the pieces of a shard."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from trainer.optim import dct, matrix
from trainer.optim.adamw import Options as AdamWOptions
from trainer.optim.dct import Norm, Transform
from trainer.optim.options import Multiplier
from trainer.optim.requests import Sum, Turn
from trainer.optim.sides import Block, Cut, cut, local
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
distributed_tensor: Any = lazy("torch.distributed.tensor")

Rank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """A rule on the most important columns of hidden matrices in a cosine basis, AdamW on the rest."""

    __pydantic_config__ = STRICT
    lr: Annotated[float, Field(ge=0)] = 2e-3
    """Learning rate of the hidden matrices."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay per step, times the learning rate."""
    tau_epochs: Annotated[float, Field(gt=0)] | None = None
    """The decay as a time instead: weight_decay = 1 / (lr * tau_epochs * steps of an epoch)."""
    rank: Rank = 0.25
    """Columns that are kept of a matrix: a number, or a share of its short side."""
    norm: Norm = "l2"
    """What columns are chosen by: their sums of squares (the least error), or of magnitudes."""
    transform: Transform = "auto"
    """How all coefficients are computed: `fft`, `matmul`, or the faster one for the device."""
    split: dict[str, int | list[int]] = field(default_factory=dict)
    """Fused weights by name pattern: so many equal blocks of rows, or the rows of each block, compressed apart."""
    multipliers: dict[str, Multiplier] = field(default_factory=dict)
    """Factors by parameter name pattern, or for all `matrices`, `embeddings` or `vectors`; the last that fits holds."""
    adamw: AdamWOptions = AdamWOptions(lr=3e-3)
    """The rule for embeddings, head, norms and biases."""


def cut_of(shape: Any, group: dict[str, Any]) -> Cut:
    """How a parameter of this logical shape (..., m, n) is compressed."""
    return cut(shape[-2], shape[-1], group["blocks"], group["rank"])


def whole_bytes(shape: Any, group: dict[str, Any]) -> int:
    """Bytes that a step holds of a parameter on every rank, however many there are: of each matrix r basis vectors in fp32, and
    r x r in float64."""
    each = sum(4 * b.rank * (b.short[1] - b.short[0]) + 8 * b.rank**2 for b in cut_of(shape, group).blocks)
    return int(each) * (shape[0] if len(shape) == 3 else 1)


def zeros(parameter: Any, cut: Cut, columns: int, dtype: Any = None) -> Any:
    """Zeros in the long layout, (..., l, columns): cut along l where the parameter is cut along either side."""
    shape = (*parameter.shape[:-2], cut.long, columns)
    return _placed(parameter, shape, dtype or matrix.state_dtype(parameter), parameter.ndim - 2)


def indices(parameter: Any, cut: Cut) -> Any:
    """Zeros for one whole number per kept column, (..., r) int64: on every rank that holds some of the matrix."""
    return _placed(parameter, (*parameter.shape[:-2], cut.indices), torch.int64, None)


def _placed(parameter: Any, shape: tuple[int, ...], dtype: Any, long: int | None) -> Any:
    if not hasattr(parameter, "placements"):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    replicate, shard = distributed_tensor.Replicate, distributed_tensor.Shard
    whole = replicate() if long is None else shard(long)
    of_experts = [p.is_shard(0) and parameter.ndim == 3 for p in parameter.placements]
    placements = [
        p if p.is_replicate() or experts else whole for p, experts in zip(parameter.placements, of_experts, strict=True)
    ]
    return distributed_tensor.zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)


@dataclass(frozen=True)
class Piece:
    """What a rank holds of one matrix, or of that matrix of each of its experts.

    Attributes:
        parameter: its number in the bucket.
        block: its place in the long layout.
        rows: its rows in this rank's shard of it; none where another rank holds all of the block.
        shape: (m, n) of the matrix.
    """

    parameter: int
    block: Block
    rows: slice
    shape: tuple[int, int]

    def entries(self, tensors: list[Any]) -> Any:
        """Its view (E_p, l_p, s) of tensors in the long layout."""
        return three(tensors[self.parameter])[:, self.rows, slice(*self.block.short)]

    def factor(self, tensors: list[Any]) -> Any:
        """Its view (E_p, l_p, r) of factors."""
        return three(tensors[self.parameter])[:, self.rows, slice(*self.block.factor)]

    def kept(self, tensors: list[Any]) -> Any:
        """Its view (E_p, r) of what there is one of per kept column."""
        tensor = tensors[self.parameter]
        return (tensor if tensor.ndim == 2 else tensor.unsqueeze(0))[:, slice(*self.block.indices)]


def three(tensor: Any) -> Any:
    """A shard as (E_p, ., .)."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def turned(values: list[Any], cuts: list[Cut]) -> Generator[Turn, Any, tuple[list[Any], list[Piece]]]:
    """Gradients in the long layout, in the dtype of states, and the pieces of all parameters."""
    answer = yield Turn(values, [c.turned for c in cuts])
    found = []
    for index, (c, (shard, start)) in enumerate(zip(cuts, answer, strict=True)):
        for block in c.blocks:
            long, short = (b - a for a, b in (block.long, block.short))
            shape = (short, long) if c.turned else (long, short)
            found.append(Piece(index, block, local(block.long, start, shard.shape[1]), shape))
    return [shard.to(matrix.state_dtype(shard)) for shard, _ in answer], found


def best(spectra: list[Any], pieces: list[Piece], norm: Norm) -> Generator[Sum, list[Any], list[Any]]:
    """The indices (E_p, r) of the best columns of each piece's matrix, from the coefficients (E_p, l_p, s) of its rows."""
    scores = [dct.scores(spectrum, norm) for spectrum in spectra]
    totals = yield from added(scores, pieces)
    return [dct.choose(total, piece.block.rank) for total, piece in zip(totals, pieces, strict=True)]


def added(parts: list[Any], pieces: list[Piece]) -> Generator[Sum, list[Any], list[Any]]:
    """One float64 tensor (E_p, ...) per piece, added over the shards of its parameter."""
    count = 1 + max(piece.parameter for piece in pieces)
    of = [[i for i, piece in enumerate(pieces) if piece.parameter == parameter] for parameter in range(count)]
    flat = [torch.cat([parts[i].flatten(1) for i in members], 1) for members in of]
    sums = yield Sum(flat, of="parts", dtype=torch.float64)
    result: list[Any] = [None] * len(pieces)
    for members, whole in zip(of, sums, strict=True):
        for i, piece in zip(members, whole.split([parts[i].flatten(1).shape[1] for i in members], 1), strict=True):
            result[i] = piece.view(parts[i].shape)
    return result


def taken(spectrum: Any, indices: Any) -> Any:
    """The columns `indices` (E_p, r) of the coefficients (E_p, l_p, s)."""
    if len(spectrum) == 1:
        return spectrum.index_select(-1, indices[0])
    return torch.take_along_dim(spectrum, indices.unsqueeze(-2), -1)


def by_parameter(values: list[Any], pieces: list[Piece]) -> list[list[Any]]:
    """Values of pieces, listed per parameter."""
    result: list[list[Any]] = [[] for _ in range(1 + max(piece.parameter for piece in pieces))]
    for value, piece in zip(values, pieces, strict=True):
        result[piece.parameter].append(value)
    return result
