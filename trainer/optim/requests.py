"""What a rule may ask of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Whole:
    """Give me this function of the whole matrices.

    `function` takes one batch (N, m, .) per entry of `inputs` and returns one batch for each of them; `inputs` holds
    lists of local shards, one entry per matrix. The answer is the list of local shards of each result.
    """

    function: Callable[..., tuple[Any, ...]]
    inputs: tuple[list[Any], ...]
