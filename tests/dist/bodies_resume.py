"""Optimizers that are saved by the project's checkpoints at one number of ranks and go on at another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.dist.bodies_optim import Shape, build, everything, give_gradients
from trainer.checkpoint.load import load, newest_verified
from trainer.checkpoint.save import save
from trainer.optim import ShardedOptimizer


def tensors_of(weights: list[nn.Parameter], optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """What a checkpoint of a run holds, by its names."""
    names = {w: f"w{i}" for i, w in enumerate(weights)}
    state = {f"optim.{key}": value for key, value in optimizer.state_tensors(names).items()}
    return {f"model.{names[w]}": w.detach() for w in weights} | state


def train_and_save(
    folder: str, rule: str, layout: str, options: dict[str, Any], count: int, dtype: torch.dtype, shapes: list[Shape]
) -> list[str]:
    """Some steps and a checkpoint; the names of its tensors on this rank."""
    weights, optimizer = build(rule, layout, options, dtype, shapes)
    for step in range(1, count + 1):
        give_gradients(weights, layout, step, options.get("transposed", False))
        optimizer.step()
    tensors = tensors_of(weights, optimizer)
    state = {"optimizer": optimizer.hyperparameters()}
    save(Path(folder), count, count, tensors, config={}, state=state, lineage={}, attempt=1)
    return sorted(tensors)


def load_and_train(
    folder: str, rule: str, layout: str, options: dict[str, Any], count: int, dtype: torch.dtype, shapes: list[Shape]
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Everything as it was loaded, and after the steps that are left of `count`."""
    found = newest_verified(Path(folder))
    assert found is not None
    weights, optimizer = build(rule, layout, options, dtype, shapes)
    with torch.no_grad():
        for weight in weights:
            weight.fill_(7.0)
    load(found[0], found[1], tensors_of(weights, optimizer))
    assert found[1].state["optimizer"] == optimizer.hyperparameters()
    loaded = everything(weights, optimizer)
    for step in range(found[1].step + 1, count + 1):
        give_gradients(weights, layout, step, options.get("transposed", False))
        optimizer.step()
    return found[1].world_size, loaded, everything(weights, optimizer)
