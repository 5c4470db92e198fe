"""A step's working memory is bounded by the size of a bucket, and no step waits for a device."""

from __future__ import annotations

import pytest
import torch

from tests.dist import bodies_step as bodies
from tests.dist.test_battery import MATRIX_RULES, RULES

SHAPE, HELD = (64, 48), 64 * 48 * 2 // 2  # bytes of a shard on one of 2 ranks, counted as bf16
MOST = 12  # times the shards in a bucket, in the width of the products: 8.6 in fp32, 10.4 in bf16


@pytest.mark.parametrize("options", [{"polar_dtype": "fp32"}, {"polar_dtype": "bf16"}])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_memory_of_a_step_is_a_small_multiple_of_a_bucket(rule, options, group) -> None:
    """T20. Whatever the number of matrices; all of them in one bucket break the bound."""

    def peak(count: int, per_bucket: int) -> float:
        peaks = group(2, bodies.peak_of_a_step, rule, count, SHAPE, per_bucket * HELD, options)
        width = 2 if options["polar_dtype"] == "fp32" else 1
        return max(peaks) / (width * per_bucket * HELD)

    few, many, huge = peak(16, 4), peak(48, 4), 12 * peak(48, 48)
    assert many < MOST
    assert many < few + 0.5
    assert huge > 2 * MOST


@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (4, "hsdp0-spread")])
@pytest.mark.parametrize("rule", RULES)
def test_no_step_waits_for_a_value(rule, world, layout, group) -> None:
    changes = [{"weight_decay": 0.1}]
    if rule in MATRIX_RULES:
        changes += [{"nesterov": True, "cautious": True, "weight_decay": 0.1}, {"polar_form": "gram", "polar_prescale": "schatten"}]
    for options in changes:
        assert group(world, bodies.step_without_waiting, rule, layout, options) == [""] * world


def test_waiting_is_noticed() -> None:
    x = torch.ones(3)
    waits = (x.sum().item, lambda: float(x[0]), lambda: bool(x.any()), lambda: x[x > 0], x.nonzero, lambda: x.equal(x))
    for wait in waits:
        with bodies.NoWaiting(), pytest.raises(AssertionError, match="hot path"):
            wait()
    counter = bodies.LiveBytes()
    with counter:
        y = torch.empty(1000)
        z = y[:10]
        del y
        assert counter.live == 4000  # a view holds all of it
        del z
    assert (counter.live, counter.peak) == (0, 4000)
