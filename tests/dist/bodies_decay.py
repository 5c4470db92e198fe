"""What the ranks of the tests of weight decay do. Imported by spawned processes."""

from __future__ import annotations

from typing import Any

import torch

from tests.dist.bodies import LLAMA, model_of, whole
from trainer import config as configuration
from trainer.optim.groups import build_optimizer
from trainer.outcome import RunError


def steps_without_gradient(options: dict[str, Any], factors: list[float]) -> list[dict[str, torch.Tensor]]:
    """Whole weights before and after steps at these factors of the rate, on gradients of zero."""
    model = model_of(attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # biases, too, have something to lose
    optimizer = build_optimizer(model, optimizer_options(options))
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    for factor in factors:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
    return [before, {name: whole(p.detach()) for name, p in model.named_parameters()}]


def refusal(options: dict[str, Any], tied: bool) -> str:
    """What the optimizer of a model says against options."""
    try:
        build_optimizer(model_of(tie_word_embeddings=tied), optimizer_options(options))
    except RunError as error:
        return error.what
    return ""


def optimizer_options(options: dict[str, Any]) -> Any:
    raw = {
        "name": "t", "model": {"config": LLAMA}, "data": {"path": "stdlib"}, "optim": options,
        "train": {"length": "1 steps", "tokens_per_step": 1024}, "parallel": {"name": "fsdp2"},
    }  # fmt: skip
    return configuration.parse(raw).optim
