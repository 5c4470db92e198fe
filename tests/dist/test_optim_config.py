"""Fused weights, transposed weights and multipliers, from the configuration to the step, under FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.dist import bodies
from trainer.optim import ShardedOptimizer

# Per architecture: how its fused weights are split, the rows of each block, and whether weights are inputs x outputs.
FUSED: dict[str, tuple[Any, dict[str, Any], dict[str, list[int]], bool]] = {
    "phi3": (
        bodies.PHI3, {"*.qkv_proj.weight": [24, 24, 24], "*.gate_up_proj.weight": 2},
        {"qkv_proj": [24, 24, 24], "gate_up_proj": [40, 40]}, False,
    ),
    "gpt2": (bodies.GPT2, {"*.c_attn.weight": 3}, {"c_attn": [24, 24, 24]}, True),
}  # fmt: skip
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "polar_dtype": "fp32"}


def alone(rule: str, start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    """The weight of a plain optimizer of one parameter."""
    weight = nn.Parameter(start.clone())
    optimizer = ShardedOptimizer([{"rule": rule, "params": [weight], **options}])
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_blocks_of_fused_weights_move_as_matrices_of_their_own(rule, architecture, group) -> None:
    config, split, blocks, transposed = FUSED[architecture]
    start = group(1, bodies.optimizer_steps, rule, 0, {}, config)[0]
    one, *others = (group(world, bodies.optimizer_steps, rule, 2, {**OPTIONS, "split": split}, config)[0] for world in (1, 2, 3))
    matrices = {name.removesuffix(".momentum") for name in one if name.endswith(".momentum")}
    assert len(matrices) == 8
    for name in matrices:
        gradients = [bodies.gradient_of(name, step, start[name].shape) for step in (0, 1)]
        first, gradients, result = (
            (t.mT if transposed else t) if isinstance(t, Tensor) else [g.mT if transposed else g for g in t]
            for t in (start[name], gradients, one[name])
        )
        rows = blocks.get(name.split(".")[-2], [first.shape[0]])
        pieces = zip(first.split(rows), zip(*(g.split(rows) for g in gradients), strict=True), strict=True)
        expected = torch.cat([alone(rule, piece.contiguous(), [g.contiguous() for g in of], **OPTIONS) for piece, of in pieces])
        assert torch.equal(result, expected), name
        for other in others:
            assert all(torch.equal(one[key], other[key]) for key in one if key.startswith(name)), name


@pytest.mark.parametrize("world", [1, 3])
def test_multipliers_scale_rates_and_decay_by_group_and_by_name(world, group) -> None:
    multipliers = {
        "matrices": {"lr": 0.5},
        "*.o_proj.weight": {"lr": 0.0},
        "*.1.mlp.*": {"weight_decay": 0.0},
        "embeddings": {"lr": 2.0},
        "model.norm.weight": {"lr": 0.0},
    }
    start = group(world, bodies.optimizer_steps, "normuon", 0, {})[0]
    options = {**OPTIONS, "adamw": {"name": "adamw", "lr": 0.01}}
    plain = group(world, bodies.optimizer_steps, "normuon", 2, options)[0]
    scaled = group(world, bodies.optimizer_steps, "normuon", 2, {**options, "multipliers": multipliers})[0]
    weights = [name for name in start if name.endswith(".weight")]
    for name in weights:
        gradients = [bodies.gradient_of(name, step, start[name].shape) for step in (0, 1)]
        embedding = "embed" in name or "lm_head" in name
        if "o_proj" in name or name == "model.norm.weight":
            assert torch.equal(scaled[name], start[name]), name
        elif embedding or "norm" in name:
            rate = 0.02 if embedding else 0.01
            expected = alone("adamw", start[name], gradients, lr=rate)
            assert (scaled[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
        else:
            changes = {"weight_decay": 0.0} if ".1.mlp." in name else {"lr": 0.025}  # the last pattern that fits holds
            assert torch.equal(scaled[name], alone("normuon", start[name], gradients, **OPTIONS | changes)), name
            assert not torch.equal(scaled[name], plain[name]), name
    assert len(weights) == 14 + 2 + 5
