"""Initial weights by the architecture's own rule, each module under a seed made from its name.

A rule may act on a module's own weights or, as GPT-2's for the projections into the residual stream, on those of modules
below it. Which weights each call writes is found by trying all calls on a copy without storage. Then every weight is
drawn whole on the CPU, by all calls that write it, in their order, and each rank keeps its shard: the full state is the
same to the bit on any number of ranks, and no rank ever holds more than the weights that one call writes.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from trainer.model.build import build
from trainer.optim.plan import shard_range
from trainer.outcome import RunError


def module_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and the module's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def allocate(model: Any, device: torch.device) -> None:
    """Give a (sharded) model on the meta device storage, without values."""
    if any(t.is_meta for t in chain(model.parameters(), model.buffers())):
        model.to_empty(device=device)
        if getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()


@torch.no_grad()
def initialize(model: Any, seed: int, device: torch.device, *, weights: bool = True) -> None:
    """Give a (sharded) model its initial values, in place; only its buffers if its `weights` are to be loaded.

    Raises:
        RunError: the architecture says of no rule how a weight starts.
    """
    allocate(model, device)
    pristine: Any = build(model.config)
    targets = dict(model.named_parameters()) if weights else {}
    targets |= {name: buffer for name, buffer in model.named_buffers() if buffer.numel()}
    calls = [(name, owner, [n for n in written if n in targets]) for name, owner, written in rule_calls(pristine)]
    left = Counter(chain.from_iterable(written for _, _, written in calls))
    forgotten = targets.keys() - left.keys()
    if forgotten:
        raise RunError(
            f"{model.config.model_type} does not say in transformers how {min(forgotten)} starts",
            where="model.config.model_type",
            mend="use another architecture, or start from weights with model.init_from",
        )
    waiting: dict[str, Tensor] = {}
    for name, owner, written in calls:
        if not written:
            continue
        for key in written:
            if key not in waiting:
                waiting[key] = _blank(targets[key])
        prefix = f"{name}." if name else ""
        twin = _twin(pristine.get_submodule(name), {key.removeprefix(prefix): waiting[key] for key in written})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module_seed(seed, name))
            owner._init_weights(twin)
        left.subtract(written)
        for key in written:
            if not left[key]:
                place(waiting.pop(key), targets[key])


def rule_calls(model: Any) -> list[tuple[str, Any, list[str]]]:
    """(module, the model whose rule it falls under, names of the tensors that the rule writes), in the library's order:
    children first. Tied weights are written under the name of what they are tied to.

    Args:
        model: on the meta device; its tensors' version counters tell what is written.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    calls: list[tuple[str, Any, list[str]]] = []

    def visit(module: nn.Module, name: str, owner: Any) -> None:
        prefix = f"{name}." if name else ""
        for key, child in module.named_children():
            visit(child, prefix + key, child if isinstance(child, PreTrainedModel) else owner)
        tensors = list(
            chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        )
        before = [tensor._version for _, tensor in tensors]
        owner._init_weights(module)
        written = [prefix + key for (key, t), old in zip(tensors, before, strict=True) if t._version != old]
        calls.append((name, owner, [key for key in written if key not in tied]))

    visit(model, "", model)
    return calls


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


def _blank(target: Tensor) -> Tensor:
    """NaN, so that a value that a rule forgets is found, not trained on."""
    fill = torch.nan if target.is_floating_point() else 0
    return torch.full(target.shape, fill, dtype=target.dtype)


def _twin(module: nn.Module, wholes: dict[str, Tensor]) -> nn.Module:
    """The module with `wholes` (by name within it) in place of its own tensors; all else stays on the meta device."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    for key, whole in wholes.items():
        child, _, rest = key.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = whole
        elif key in twin._parameters:
            twin._parameters[key] = nn.Parameter(whole, requires_grad=False)
        else:
            twin._buffers[key] = whole
    for child, inside in below.items():
        twin._modules[child] = _twin(module._modules[child], inside)  # type: ignore[arg-type]
    return twin
