"""What a rule may ask of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
