"""Sums over the shards of each matrix, in every layout."""

from __future__ import annotations

import pytest
import torch

from tests.dist import bodies_optim, bodies_sums
from tests.dist.test_battery import LAYOUTS

FUSED = [(18, 10), (18, 7), (2, 18, 6)]
EXPERTS = [(4, 6, 10), (3, 10, 6), (5, 3, 3)]
CASES = [
    (1, "plain"), *LAYOUTS, (2, "shard2"), (7, "shard2"), (4, "hsdp0-spread"),
]  # fmt: skip


def expected(shapes, blocks):
    """Per parameter the sum of squares of the matrix, or block, that each entry belongs to."""
    result = []
    for i, shape in enumerate(shapes):
        square = bodies_optim.tensor(i, shape, torch.float64) ** 2
        rows = square.split(blocks or [shape[-2]], -2)
        result.append(torch.cat([piece.sum((-2, -1), keepdim=True).expand_as(piece) for piece in rows], -2))
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("blocks", [[], [8, 4, 6]])
@pytest.mark.parametrize("world, layout", CASES)
def test_sums_of_entries_are_those_of_whole_matrices(world, layout, blocks, dtype, group) -> None:
    shapes = FUSED if blocks else bodies_optim.SHAPES
    shapes = EXPERTS if layout == "shard2" and not blocks else [FUSED[2]] if layout == "shard2" else shapes
    for results, _ in group(world, bodies_sums.totals, layout, {"blocks": blocks}, shapes, "entries", dtype):
        for one, other in zip(results, expected(shapes, blocks), strict=True):
            assert ((one - other) / other).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)


def test_transposed_weights_too(group) -> None:
    shapes = [(18, 10), (2, 18, 6)]
    for world, layout in ((3, "shard0"), (2, "shard1")):
        options = {"blocks": [8, 4, 6], "transposed": True}
        for results, _ in group(world, bodies_sums.totals, layout, options, shapes, "entries", torch.float64):
            for one, other in zip(results, expected(shapes, [8, 4, 6]), strict=True):
                assert torch.allclose(one.mT, other, rtol=1e-14)


@pytest.mark.parametrize(
    "world, layout, factor",
    [(1, "plain", 1), (3, "shard0", 3), (7, "shard1", 7), (4, "hsdp0-spread", 2), (3, "ddp", 1), (3, "replicate", 1)],
)
def test_parts_are_added_once_per_shard_and_never_over_replicas_or_experts(world, layout, factor, group) -> None:
    for results, reductions in group(
        world, bodies_sums.totals, layout, {}, bodies_optim.SHAPES, "parts", torch.float64
    ):
        alone = sum(bool((r == 2.0).all()) for r in results)
        assert all(bool((r == 2.0 * factor).all() or (r == 2.0).all()) for r in results)
        experts_apart = factor > 1 and layout != "shard1"  # four experts on ranks of their own
        assert alone == (len(results) if factor == 1 else int(experts_apart))
        buckets = group(world, bodies_sums.buckets_of, layout, bodies_optim.SHAPES)[0]
        assert reductions == (0 if factor == 1 else buckets)
    assert all(n == 0 for _, n in group(3, bodies_sums.totals, "shard0", {}, [(4, 6, 10)], "entries", torch.float64))


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_a_sum_of_many_entries_does_not_depend_on_the_ranks(world, group) -> None:
    """Large ones beside small ones: added one after the other in fp32 the small ones would be lost."""
    shapes = [(301, 257), (64, 900)]
    one = group(1, bodies_sums.totals, "plain", {}, shapes, "entries", torch.float64)[0][0]
    for other, _ in group(world, bodies_sums.totals, "shard0", {}, shapes, "entries", torch.float64):
        for a, b in zip(one, other, strict=True):
            assert ((a - b) / a).abs().max() < 1e-14
