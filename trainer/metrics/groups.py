"""What an optimizer step does to each parameter group: gradient norm, size of the update and of the weights, decay time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.distributed import world


class GroupMetrics:
    """Measures every `every`-th step; at all others it does nothing.

    Sums of squares are taken in float64 on the device, each rank over its shards, and added over the ranks in one
    all-reduce, so that the figures do not depend on the number of ranks. The host waits for them only when they are
    taken.

    Args:
        optimizer: its groups carry `label`, `lr`, `weight_decay`.
        every: steps between measurements; None: never.
        steps_per_epoch: optimizer steps of one pass over the training data.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int | None, steps_per_epoch: float) -> None:
        self.groups, self.every, self.steps_per_epoch = optimizer.param_groups, every, steps_per_epoch
        self.names = names([group["label"] for group in self.groups])
        self.shares = [
            torch.tensor(
                [1 / copies(p) for p in group["params"]], dtype=torch.float64, device=group["params"][0].device
            )
            for group in (self.groups if every is not None else [])
        ]
        self._pending: tuple[Tensor, float, list[tuple[float, float]]] | None = None

    @contextmanager
    def measure(self, step: int, ratio: float) -> Iterator[None]:
        """Measure the optimizer step in the body. All ranks call it alike.

        Args:
            step: steps done before this one.
            ratio: what gradients must be multiplied by, before the body, to be those of the mean loss.
        """
        self._pending = None
        if self.every is None or (step + 1) % self.every:
            yield
            return
        pairs = list(zip(self.groups, self.shares, strict=True))
        gradients = [squares([gradient(p) for p in group["params"]], shares) for group, shares in pairs]
        before = [[local(p).clone() for p in group["params"]] for group in self.groups]
        yield
        weights = [squares([local(p) for p in group["params"]], shares) for group, shares in pairs]
        for group, old in zip(self.groups, before, strict=True):
            torch._foreach_sub_(old, [local(p) for p in group["params"]])
        updates = [squares(old, shares) for old, shares in zip(before, self.shares, strict=True)]
        vector = torch.stack([*gradients, *updates, *weights])
        dist.all_reduce(vector)
        self._pending = vector, ratio, [(group["lr"], group["weight_decay"]) for group in self.groups]

    def take(self) -> dict[str, Any]:
        """`{"groups": {name: figures}}` of the step just measured; empty at all other steps."""
        if self._pending is None:
            return {}
        vector, ratio, rates = self._pending
        count = len(self.groups)
        values = vector.tolist()
        self._pending = None
        found = {}
        for index, (name, (rate, decay)) in enumerate(zip(self.names, rates, strict=True)):
            elements = sum(p.numel() for p in self.groups[index]["params"])
            gradient, update, weight = (values[index + part * count] for part in range(3))
            shrink = rate * decay * self.steps_per_epoch  # share of a weight that an epoch takes away
            found[name] = {
                "gradient_norm": _root(gradient, ratio),
                "update_rms": _root(update / elements),
                "weight_rms": _root(weight / elements),
                "learning_rate": rate,
                "tau_epochs": 1 / shrink if shrink else None,
            }
        return {"groups": found}


def _root(value: float, factor: float = 1.0) -> float | None:
    """None for what JSON has no number for: weights that an update has blown up."""
    return math.sqrt(value) * factor if math.isfinite(value) else None


def names(labels: list[str]) -> list[str]:
    """The labels, numbered from 2 where one comes again: `matrices`, `matrices-2`."""
    seen: Counter[str] = Counter()
    result = []
    for label in labels:
        seen[label] += 1
        result.append(label if seen[label] == 1 else f"{label}-{seen[label]}")
    return result


def squares(tensors: list[Tensor], shares: Tensor) -> Tensor:
    """Weighted sum of the tensors' sums of squares; a float64 scalar on the device."""
    return (torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square() * shares).sum()


def copies(tensor: Any) -> int:
    """Number of ranks that hold the same values of a tensor as this one: all of them, unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return world()
    mesh = tensor.device_mesh
    return world() // math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_shard())


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, outside of autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gradient(parameter: Any) -> Tensor:
    """This rank's part of the gradient; empty where there is none, which counts zero."""
    return local(parameter).new_empty(0) if parameter.grad is None else local(parameter.grad)
