"""What a rule may ask of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Whole:
    """Give me this function of the whole matrices.

    Attributes:
        function: takes one batch per input, (N, m, n) for a matrix, (N, m, 1) for row statistics, (N, 1, n) for column
            statistics, and returns as many batches of the same shapes, and which of the N matrices it rejected (N,),
            bool: those it answered with no update.
        inputs: per input the list of local shards, one entry per parameter.
        kinds: what each input is: "matrix", "rows" or "columns".
        dtypes: the dtype in which each input and its result travel, and in which the function gets it. A value is
            rounded to it even where it does not travel, so that the result does not depend on who owns what.

    The answer is, per input, the list of local shards of its result.
    """

    function: Callable[..., tuple[tuple[Any, ...], Any]]
    inputs: tuple[list[Any], ...]
    kinds: tuple[str, ...]
    dtypes: tuple[Any, ...]


@dataclass(frozen=True)
class Sum:
    """Add these up over each whole matrix. All sums of a bucket travel in one reduction.

    Attributes:
        values: the local values, one tensor per parameter.
        of: "entries": a value per entry, shaped like the shard (..., m_p, n_p). Each matrix, and each block of fused
            weights, has a sum of its own. "parts": what the shard adds to sums that the rule has begun, in a shape that
            is the same on all ranks; added over the shards as they are.
        dtype: in which all is added, also within a shard: float64, or fp32. Then no sum depends on the number of ranks
            by more than rounding in it. Squares may be added in the entries' own dtype along a row of a shard.
        power: 2 adds the squares of entries.
        mean: of entries, divide by how many there are.
        sound: of entries, count a matrix whose sum is not finite as rejected: its update must be zero.

    The answer is a list of tensors of that dtype, one per parameter: of entries the sum of the matrix that each belongs
    to, (..., 1, 1), or (..., m_p, 1) where the weights are fused; of parts the sums in the shape given.
    """

    values: list[Any]
    of: Literal["entries", "parts"] = "entries"
    dtype: Any = None  # float64
    power: Literal[1, 2] = 1
    mean: bool = False
    sound: bool = False


@dataclass(frozen=True)
class Turn:
    """Give me the shards of these matrices along their long sides.

    Attributes:
        values: local shards, one per parameter, (..., m_p, n_p).
        turned: per parameter, whether the long layout is the transpose (n, m).

    The answer is a list of (shard, start), one per parameter: the shard (E_p, l_p, s) of the long layout, which starts at
    row `start` of it. Where the long side is sharded, or nothing is, that is a view of the value and nothing travels.
    Values travel in their own dtype.
    """

    values: list[Any]
    turned: list[bool]


@dataclass(frozen=True)
class Expand:
    """W <- keep W + by (factor x vectors) for weights in their own layout, from factors in the long one.

    Attributes:
        weights: local shards, one per parameter, changed in place.
        factors: per parameter its shard (E_p, l_p, width).
        vectors: per parameter and block (E_p, r, s of the block).
        cuts: per parameter its `trainer.optim.sides.Cut`.
        rejected: per parameter and block (E_p,), bool: matrices whose factor is zero because it was not sound; empty: none.

    Of a turned parameter the factor travels, or the product, whichever is less.
    """

    weights: list[Any]
    factors: list[Any]
    vectors: list[list[Any]]
    cuts: list[Any]
    keep: float
    by: float
    rejected: list[list[Any]] = field(default_factory=list)


Request = Whole | Sum | Turn | Expand
