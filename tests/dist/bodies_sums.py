"""What ranks run in the tests of sums over shards."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.bodies_optim import Shape, build, whole
from trainer.optim import muon
from trainer.optim.requests import Sum


def totals(
    layout: str, options: dict[str, Any], shapes: list[Shape], of: Any, dtype: torch.dtype
) -> tuple[list[Tensor], int]:
    """Per parameter the answer to a sum, and the reductions that all of them took.

    Of entries: of the weights' squares, where each weight was. Of parts: of ones per shard.
    """
    parts: list[Tensor] = []

    def rule(
        weights: list[Tensor], _: list[Tensor], __: dict[str, list[Tensor]], ___: dict[str, Any]
    ) -> Generator[Sum, list[Tensor], None]:
        squares = [w.to(dtype) ** 2 for w in weights]
        given = squares if of == "entries" else [torch.full((3, i + 1), 2.0) for i in range(len(weights))]
        answers = yield Sum(given, of=of, dtype=dtype)
        for weight, given_, answer in zip(weights, given, answers, strict=True):
            assert answer.dtype == dtype
            if of == "entries":
                weight.copy_(answer.expand_as(weight))
            else:
                assert answer.shape == given_.shape
                parts.append(answer)

    weights, optimizer = build("muon", layout, options, torch.float64, shapes)
    with (
        mock.patch.object(muon, "update", rule),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        optimizer.step()
    return parts or [whole(w) for w in weights], reduce.call_count


def buckets_of(layout: str, shapes: list[Shape]) -> int:
    return len(build("muon", layout, {}, torch.float64, shapes)[1]._buckets)
