"""Rules with known defects of other implementations, for the negative controls of the battery."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.bodies_optim import Shape, place, steps, tensor
from trainer.optim import matrix, muon, normuon
from trainer.optim.polar import COEFFICIENTS, normalize, polar, reference, transport
from trainer.optim.requests import Whole

Update = Callable[..., Generator[Whole, list[list[Tensor]], None]]


def norm_of_the_shard(
    weights: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]], group: dict[str, Any]
) -> Generator[Whole, list[list[Tensor]], None]:
    """NorMuon whose update gets the norm that it should have as a whole, but shard by shard."""
    ahead = matrix.advance(state["momentum"], gradients, group)

    def factors(u: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (polar(u, group["polar"], torch.float32),), torch.zeros(len(u), dtype=torch.bool)

    (factor,) = yield Whole(factors, (ahead,), ("matrix",), (transport(torch.float32),))
    directions = []
    for o, v in zip(factor, state["mean_square"], strict=True):
        v.lerp_(o.square().mean(-1, keepdim=True), 1 - group["beta2"])
        h = o / (v.sqrt() + group["eps"])
        norm = h.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-8)
        directions.append(0.2 * math.sqrt(h.shape[-2] * h.shape[-1]) / norm * h)
    matrix.apply(weights, directions, group)


def with_padded_rows(true: Update) -> Update:
    """A rule that sees its matrices with the zero rows which fill up the last shard."""

    def update(*arguments: Any) -> Generator[Whole, list[list[Tensor]], None]:
        work = true(*arguments)
        request = next(work)
        world = dist.get_world_size()

        def padded(*batches: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            rows = batches[0].shape[-2]
            outputs, bad = request.function(*(torch.nn.functional.pad(b, (0, 0, 0, -rows % world)) for b in batches))
            return tuple(output[:, :rows] for output in outputs), bad

        result = yield replace(request, function=padded)
        try:
            work.send(result)
        except StopIteration:
            return

    return update


def lone_matrices_in_two_dimensions(batched: bool) -> Callable[..., Tensor]:
    """Newton-Schulz that takes a lone matrix out of its batch, unless `batched`."""

    def iterate(u: Tensor, name: str, dtype: torch.dtype, *_: Any) -> Tensor:
        safety, coefficients = COEFFICIENTS[name]
        x = normalize(u, safety, dtype)
        lone = len(x) == 1 and not batched
        x, add = (x[0], torch.addmm) if lone else (x, torch.baddbmm)
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.unsqueeze(0) if lone else x

    return iterate


def defective_steps(defect: str, rule: str, layout: str, options: dict[str, Any], shapes: list[Shape]) -> dict[str, Tensor]:
    """The battery's steps by a rule with a defect."""
    if defect == "norm of the shard":
        patches = [mock.patch.object(normuon, "update", norm_of_the_shard)]
    elif defect == "padded rows":
        module = {"muon": muon, "normuon": normuon}[rule]
        patches = [mock.patch.object(module, "update", with_padded_rows(module.update))]
    else:
        instead = lone_matrices_in_two_dimensions(batched=defect == "batches")
        patches = [mock.patch.object(module, "polar", instead) for module in (muon, normuon)]
    for patch in patches:
        patch.start()
    try:
        return steps(rule, layout, options, shapes=shapes)
    finally:
        for patch in patches:
            patch.stop()


def error_by_summed_gram(shape: Shape, dtype: torch.dtype) -> float:
    """Relative error of a polar factor from row shards alone: the Gram matrix X^T X is summed over the ranks in `dtype`,
    and iterated in fp32 for what X is multiplied by."""
    left, right = torch.linalg.qr(tensor(0, shape).double())[0], torch.linalg.qr(tensor(1, (shape[1],) * 2).double())[0]
    full = left / torch.arange(1, shape[1] + 1) @ right.mT
    x = place(full.float(), "shard0").to_local() / (1.02 * full.norm().float())  # type: ignore[attr-defined]
    gram = (x.mT @ x).to(dtype)
    dist.all_reduce(gram)
    gram, factor = gram.float(), torch.eye(shape[1])
    for a, b, c in COEFFICIENTS["polar-express"][1]:
        z = a * torch.eye(shape[1]) + b * gram + c * gram @ gram
        gram, factor = z @ gram @ z, factor @ z
    expected = place(reference(full[None])[0], "shard0").to_local()  # type: ignore[attr-defined]
    squares = torch.stack([(x @ factor - expected).double().square().sum(), expected.square().sum()])
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())
