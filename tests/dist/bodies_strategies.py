"""What ranks run in the tests of the strategies."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.dist import bodies
from trainer import config as configuration
from trainer.model.loss import summed_loss
from trainer.parallel import fsdp2


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


def overlap_changes_nothing(options: Any, accumulation: int) -> bool:
    """Whether gradients under our collectives for CPUs equal those under torch's to the bit, and were not torch's."""
    found, ours = [], []
    for install in (fsdp2.overlap.install, lambda wrapped, chain: None):
        with mock.patch.object(fsdp2.overlap, "install", install):
            model, strategy = bodies.spread_model_of(options)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for micro in range(accumulation):
            tokens = torch.randint(0, bodies.VOCABULARY, (2, bodies.LENGTH), generator=generator)
            strategy.synchronize(last=micro == accumulation - 1)
            strategy.backward(summed_loss(strategy.forward, tokens, tokens))
        found.append([p.grad.to_local().clone() for p in model.parameters()])
        ours.append(strategy.reductions is not None)
    return ours == [True, False] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
