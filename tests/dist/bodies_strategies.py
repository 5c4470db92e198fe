"""What ranks run in the tests of the strategies."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.dist import bodies
from trainer import config as configuration


def own_matrices(options: Any) -> int:
    """How many matrices this rank orthogonalizes."""
    model, strategy = bodies.spread_model_of(options)
    raw = {
        "name": "t", "model": {"config": bodies.LLAMA}, "data": {"path": "stdlib"}, "optim": {"name": "normuon"},
        "train": {"length": "1 steps", "tokens_per_step": 1024}, "parallel": {"name": "single"},
    }  # fmt: skip
    optimizer = strategy.optimizer(model, configuration.parse(raw).optim)
    dist.barrier()
    return sum(len(bucket.route(("matrix",)).mine) for _, _, bucket in optimizer._buckets)
