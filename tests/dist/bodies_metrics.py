"""What ranks run for the figures of parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.dist.bodies_optim import SHAPES, place, tensor, whole
from trainer.metrics.groups import GroupMetrics
from trainer.optim import ShardedOptimizer

RATIO = 1.25


def measured(layout: str, clip: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of one step over the ranks, the same by hand in float64 from whole tensors). The last weight of the first
    group has no gradient."""
    weights = [torch.nn.Parameter(place(tensor(i, shape), layout)) for i, shape in enumerate(SHAPES)]
    flat = layout.replace("shard1", "shard0")
    vectors = [torch.nn.Parameter(place(tensor(100 + i, (size,)), flat)) for i, size in enumerate((5, 16, 2))]
    optimizer = ShardedOptimizer([
        {"rule": "muon", "label": "matrices", "params": weights[:6], "lr": 0.02, "weight_decay": 0.1},
        {"rule": "muon", "label": "matrices", "params": weights[6:], "lr": 0.01},
        {"rule": "adamw", "label": "vectors", "params": vectors, "lr": 0.003},
    ])  # fmt: skip
    for i, parameter in enumerate(weights + vectors):
        where = layout if parameter.ndim > 1 else flat
        parameter.grad = None if i == 5 else place(tensor(1000 + i, tuple(parameter.shape)), where)
    groups = [weights[:6], weights[6:], vectors]
    gradients = [[whole(p.grad).double() for p in group if p.grad is not None] for group in groups]
    before = [[whole(p).double() for p in group] for group in groups]
    metrics = GroupMetrics(optimizer, 3, steps_per_epoch=50.0)
    assert metrics.take() == {}
    with metrics.measure(2, RATIO):
        for parameter in weights + vectors:
            if parameter.grad is not None:
                parameter.grad.mul_(clip)
        optimizer.step()
    found = metrics.take()["groups"]
    assert metrics.take() == {}
    after = [[whole(p).double() for p in group] for group in groups]
    expected = {}
    for name, group, old, new in zip(("matrices", "matrices-2", "vectors"), gradients, before, after, strict=True):
        elements = sum(w.numel() for w in new)
        expected[name] = {
            "gradient_norm": math.sqrt(sum(float(g.square().sum()) for g in group)) * RATIO,
            "update_rms": math.sqrt(sum(float((n - o).square().sum()) for n, o in zip(new, old, strict=True)) / elements),
            "weight_rms": math.sqrt(sum(float(n.square().sum()) for n in new) / elements),
        }
    with metrics.measure(3, RATIO):
        optimizer.step()
    assert metrics.take() == {}
    return found, expected
