"""A step's working memory is bounded by the size of a bucket, and no step waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.dist import bodies_step as bodies
from tests.dist.test_battery import LOW_RANK_RULES, MATRIX_RULES, RULES, WHOLE_RULES
from trainer.registry import alternatives

SHAPE = (64, 48)
LARGE = (512, 384)  # the histogram of ROOT has a size of its own, for each matrix that is worked on
MOST = 12  # times the shards in a bucket, in the width of the products: 8.6 in fp32, 10.4 in bf16


COSTS = [(rule, precision) for rule in WHOLE_RULES for precision in ("fp32", "bf16")]
COSTS.remove(("root", "bf16"))  # two minutes on a CPU without bf16 products
COSTS += [(rule, "fp32") for rule in MATRIX_RULES if rule not in WHOLE_RULES]


@pytest.mark.parametrize("rule, precision", COSTS)
def test_memory_of_a_step_is_a_small_multiple_of_a_bucket(rule, precision, group) -> None:
    """T20. Whatever the number of matrices; all of them in one bucket break the bound."""
    rows, columns = SHAPE if rule != "root" else LARGE
    held = rows * columns  # bytes of a shard on one of 2 ranks, counted as bf16
    options = {"polar_dtype": precision} if rule in WHOLE_RULES else {}

    def peak(count: int, per_bucket: int) -> float:
        peaks = group(2, bodies.peak_of_a_step, rule, count, (rows, columns), per_bucket * held, options)
        width = 2 if precision == "fp32" else 1
        return max(peaks) / (width * per_bucket * held)

    few, many, huge = peak(16, 4), peak(48, 4), 12 * peak(48, 48)
    assert many < MOST
    assert many < few + 0.5
    assert huge > (2 if rule in WHOLE_RULES else 1) * MOST


@pytest.mark.parametrize("rule", LOW_RANK_RULES)
def test_memory_of_a_step_keeps_its_bound_on_many_ranks(rule) -> None:
    """Rank 0 of 32 that do not exist. Low-rank rules hold some of each matrix whole, which would grow with the ranks."""
    rows, world = 128, 32
    held = 2 * rows * rows // world  # bytes of a shard, counted as bf16
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        peaks = [bodies.peak_of_a_step(rule, n, (rows, rows), world * held, {"rank": 32}) for n in (32, 96)]
    finally:
        dist.destroy_process_group()
    assert max(peaks) < MOST * 2 * world * held
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (4, "hsdp0-spread")])
@pytest.mark.parametrize("rule", RULES)
def test_no_step_waits_for_a_value(rule, world, layout, group) -> None:
    known = alternatives("trainer.optim")[rule].Options
    wanted: list[dict[str, Any]] = [
        {"weight_decay": 0.1},
        {"nesterov": True, "cautious": True, "weight_decay": 0.1},
        {"polar_form": "gram", "polar_prescale": "schatten"},
        {"clip": "outliers"},
        {"mode": "unit-rms"},
        {"error_feedback": "4-bit", "refresh": 2},
    ]
    changes = [change for change in wanted if all(hasattr(known, key) for key in change)]
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
