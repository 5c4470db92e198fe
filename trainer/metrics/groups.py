"""What an optimizer step does to each parameter group: gradient norm, size of the update and of the weights, decay time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.distributed import world
from trainer.optim.decay import tau_epochs


class Parts(Protocol):
    """What this rank holds of the parameters, group by group."""

    members: list[list[Any]]
    """The parameters of each of the optimizer's groups."""

    def weight(self, parameter: Any) -> Tensor: ...

    def gradient(self, parameter: Any) -> Tensor: ...

    def copies(self, parameter: Any) -> int: ...


class Tensors:
    """Parts of plain tensors and DTensors."""

    def __init__(self, members: list[list[Any]]) -> None:
        self.members = members

    def weight(self, parameter: Any) -> Tensor:
        return local(parameter)

    def gradient(self, parameter: Any) -> Tensor:
        """Empty where there is none, which counts zero."""
        return local(parameter).new_empty(0) if parameter.grad is None else local(parameter.grad)

    def copies(self, parameter: Any) -> int:
        """Number of ranks that hold the same values of a tensor as this one: all of them, unless it is sharded."""
        if not isinstance(parameter, DTensor):
            return world()
        mesh = parameter.device_mesh
        placed = enumerate(parameter.placements)
        return world() // math.prod(mesh.size(i) for i, placement in placed if placement.is_shard())


class GroupMetrics:
    """Measures every `every`-th step; at all others it does nothing.

    Sums of squares are taken in float64 on the device, each rank over its shards, and added over the ranks in one
    all-reduce, so that the figures do not depend on the number of ranks. The host waits for them only when they are
    taken.

    Args:
        optimizer: its groups carry `label`, `lr`, `weight_decay`.
        every: steps between measurements; None: never.
        steps_per_epoch: optimizer steps of one pass over the training data.
        parts: where a strategy keeps weights and gradients elsewhere than in the parameters; None: it does not.
    """

    def __init__(self, optimizer: Any, every: int | None, steps_per_epoch: float, parts: Parts | None = None) -> None:
        self.groups, self.every, self.steps_per_epoch = optimizer.param_groups, every, steps_per_epoch
        self.names = names([group["label"] for group in self.groups])
        self.parts: Parts = parts or Tensors([group["params"] for group in self.groups])
        self.shares = [
            torch.tensor(
                [1 / self.parts.copies(p) for p in members],
                dtype=torch.float64,
                device=self.parts.weight(members[0]).device,
            )
            for members in (self.parts.members if every is not None else [])
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
        parts, pairs = self.parts, list(zip(self.parts.members, self.shares, strict=True))
        gradients = [squares([parts.gradient(p) for p in members], shares) for members, shares in pairs]
        before = [[parts.weight(p).clone() for p in members] for members in parts.members]
        yield
        weights = [squares([parts.weight(p) for p in members], shares) for members, shares in pairs]
        for members, old in zip(parts.members, before, strict=True):
            torch._foreach_sub_(old, [parts.weight(p) for p in members])
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
            elements = sum(entries(p) for p in self.parts.members[index])
            gradient, update, weight = (values[index + part * count] for part in range(3))
            found[name] = {
                "gradient_norm": _root(gradient, ratio),
                "update_rms": _root(update / elements),
                "weight_rms": _root(weight / elements),
                "learning_rate": rate,
                "tau_epochs": tau_epochs(rate, decay, self.steps_per_epoch),
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
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    return (norms.to(shares.device).square() * shares).sum()


def entries(parameter: Any) -> int:
    """Entries of a whole parameter, also of one that ZeRO has taken apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, outside of autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
