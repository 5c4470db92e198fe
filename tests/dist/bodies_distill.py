"""Distillation inside warm ranks. Imported by spawned processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from tests.dist import bodies_run
from trainer import config as configuration
from trainer import distributed
from trainer.data.batches import MicroBatch
from trainer.ensemble import cache_task, forms, manifest
from trainer.ensemble.teachers import Members
from trainer.guard.faults import arm
from trainer.outcome import RunError


def cache(
    path: str, overrides: list[str], teacher: str, form: dict[str, Any], out: str, faults: str = "", offload: str | None = None
) -> dict[str, Any]:
    """Make a cache in parts of one batch; an orderly error as its text."""
    arm(faults)
    try:
        config = configuration.load(Path(path), overrides)
        with mock.patch.object(cache_task, "PART_BYTES", 1):
            return cache_task.make(teacher, config, forms.of_json(form), Path(out), offload=offload)
    except RunError as error:
        return {"error": str(error)}


def train(path: str, overrides: list[str], faults: str = "") -> dict[str, Any]:
    """A run, and how often its teacher was asked."""
    asked: list[int] = []
    own = Members.answer

    def answer(self: Members, batch: MicroBatch) -> Any:
        asked.append(1)
        return own(self, batch)

    with mock.patch.object(Members, "answer", answer):
        return {**bodies_run.train(path, overrides, faults=faults), "asked": len(asked)}


def members_between_steps(path: str, overrides: list[str], teacher: str) -> dict[str, Any]:
    """Live members after they answered: what they hold, and whether anything would train them."""
    config = configuration.load(Path(path), overrides)
    device = distributed.start(config.resources)
    runs = Path(config.runs)
    members = Members(runs, manifest.read(runs, teacher), "fp32", device, sharded=True)
    tokens = torch.arange(32).view(2, 16)
    members.answer(MicroBatch(tokens, tokens, None))
    every = [parameter for model in members.models for parameter in model.parameters()]
    return {
        "sharded": all(isinstance(parameter, DTensor) for parameter in every),
        "frozen": not any(parameter.requires_grad for parameter in every),
        "eval": not any(module.training for model in members.models for module in model.modules()),
    }
