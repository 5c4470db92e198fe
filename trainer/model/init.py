"""Initial weights by the architecture's own rule, each module under a seed made from its name.

A module's whole weights are drawn on the CPU, and each rank keeps its shard: the full state is the same to the bit on
any number of ranks, and no rank ever holds more than one whole module.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from trainer.optim.plan import shard_range


def module_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and the module's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def initialize(model: Any, seed: int, device: torch.device) -> None:
    """Give a (sharded) model on the meta device storage and its initial values, in place."""
    model.to_empty(device=device)
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    leaves = {name: module for name, module in model.named_modules() if _own(module)}
    for name, module in leaves.items():
        whole = _whole_copy(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module_seed(seed, name))
            model._init_weights(whole)
        for key, target in _own(module).items():
            source = dict(_own(whole))[key]
            place(source, target)


def place(whole: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, or this rank's shard of it, into `target`."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    piece = whole
    for mesh_dim, placement in enumerate(target.placements):
        if isinstance(placement, Shard):
            parts, index = target.device_mesh.size(mesh_dim), target.device_mesh.get_local_rank(mesh_dim)
            start, stop = shard_range(piece.shape[placement.dim], parts, index)
            piece = piece.narrow(placement.dim, start, stop - start)
    target.to_local().copy_(piece)


def _own(module: nn.Module) -> dict[str, Tensor]:
    own = dict(module.named_parameters(recurse=False))
    return own | dict(module.named_buffers(recurse=False))


def _whole_copy(module: nn.Module) -> nn.Module:
    """The module with whole CPU tensors of its own in place of its (sharded) ones."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    for key, value in module._parameters.items():
        if value is not None:
            # NaN where the architecture's rule writes nothing: a forgotten weight is found, not trained on.
            twin._parameters[key] = nn.Parameter(torch.full(value.shape, torch.nan, dtype=value.dtype))
    for key, value in module._buffers.items():
        if value is not None:
            empty = torch.zeros(value.shape, dtype=value.dtype)
            twin._buffers[key] = empty
    return twin
