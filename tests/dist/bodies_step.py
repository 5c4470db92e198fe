"""What a step costs beside arithmetic: bytes that live at a time, and waiting for values of tensors."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.dist.bodies_optim import SHAPES, Shape, build, give_gradients, place, tensor
from trainer.optim import ShardedOptimizer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside, while they live; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a tensor's value in Python, or a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "repeat_interleave")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tree_leaves(args[1:2]) if isinstance(t, Tensor))
        if name in self.WAITS or by_mask:
            raise AssertionError(f"{name} in the hot path")
        return function(*args, **(kwargs or {}))


def peak_of_a_step(rule: str, count: int, shape: Shape, bucket_bytes: int, options: dict[str, Any]) -> int:
    """Most bytes beside parameters, gradients and state, while `count` matrices make their second step."""
    weights = [nn.Parameter(place(tensor(i, shape), "shard0")) for i in range(count)]
    optimizer = ShardedOptimizer([{"rule": rule, "params": weights, **options}], bucket_bytes=bucket_bytes)
    for step in (1, 2):
        give_gradients(weights, "shard0", step)
        counter = LiveBytes()
        with counter:
            optimizer.step()
    patience = time.monotonic() + 10
    while counter.live > 64 and time.monotonic() < patience:
        time.sleep(0.01)  # the thread of a collective lets go of its buffers a little later
    assert counter.live <= 64, f"{counter.live} bytes of a step stay"
    return counter.peak


def step_without_waiting(rule: str, layout: str, options: dict[str, Any]) -> str:
    """What a step under `NoWaiting` says, with gradients of which one is missing and one not finite."""
    weights, optimizer = build(rule, layout, options, torch.float32, SHAPES)
    give_gradients(weights, layout, 1)
    weights[1].grad = None
    give = weights[0].grad
    assert give is not None
    give.mul_(float("nan"))
    try:
        with NoWaiting():
            optimizer.step()
    except AssertionError as error:
        return str(error)
    return ""
