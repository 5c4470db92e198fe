"""What ranks run in the battery of the optimizers."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer.optim import ShardedOptimizer
from trainer.optim.sharded import rule_of

Shape = tuple[int, ...]

# Tall, wide, square, uneven for every world size, rows fewer than ranks, one row, one column, independent matrices, and
# several of one shape, of an even and an odd number of entries.
SHAPES: list[Shape] = [
    (20, 12), (12, 20), (16, 16), (7, 5), (3, 10), (1, 9), (9, 1), (4, 6, 10), (20, 12), (7, 9), (7, 9), (7, 9),
]  # fmt: skip


def tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@cache
def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def place(full: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor in a layout: plain, ddp, replicate, shard0 to shard2, hsdp0 or hsdp1 on (2, world / 2) ranks."""
    if layout in ("plain", "ddp"):
        return full
    world = dist.get_world_size()
    if layout.startswith("hsdp"):
        return distribute_tensor(full, mesh_of(2, world // 2), [Replicate(), Shard(int(layout[4]))])
    placement = Replicate() if layout == "replicate" else Shard(int(layout.removeprefix("shard")))
    return distribute_tensor(full, mesh_of(world), [placement])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build(
    rule: str, layout: str, options: dict[str, Any], dtype: torch.dtype, shapes: list[Shape] = SHAPES
) -> tuple[list[nn.Parameter], ShardedOptimizer]:
    """Parameters and their optimizer. Under the option `transposed` they are stored as (inputs, outputs)."""
    stored = [tensor(i, shape, dtype) for i, shape in enumerate(shapes)]
    if options.get("transposed"):
        stored = [full.mT.contiguous() for full in stored]
    weights = [nn.Parameter(place(full, layout)) for full in stored]
    named = [(f"w{i}", w) for i, w in enumerate(weights)]
    engine: dict[str, Any] = {"spread_replicas": True} if layout.endswith("-spread") else {}
    if layout == "ddp":
        engine["replicas"] = dist.group.WORLD
    # 600 bytes: several buckets, also here.
    return weights, ShardedOptimizer([{"rule": rule, "params": named, **options}], bucket_bytes=600, **engine)


def give_gradients(weights: list[nn.Parameter], layout: str, step: int, transposed: bool = False) -> None:
    for i, weight in enumerate(weights):
        gradient = tensor(1000 * step + i, tuple(weight.mT.shape if transposed else weight.shape), weight.dtype)
        weight.grad = place(gradient.mT.contiguous() if transposed else gradient, layout)


def steps(
    rule: str, layout: str, options: dict[str, Any], count: int = 3, dtype: torch.dtype = torch.float32,
    shapes: list[Shape] = SHAPES,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Weights and state, whole, after some steps."""
    weights, optimizer = build(rule, layout, options, dtype, shapes)
    for step in range(1, count + 1):
        give_gradients(weights, layout, step, options.get("transposed", False))
        optimizer.step()
    assert optimizer.take_rejected() == 0
    return everything(weights, optimizer)


def everything(weights: list[nn.Parameter], optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    names = {w: f"w{i}" for i, w in enumerate(weights)}
    result = {names[w]: whole(w) for w in weights}
    return result | {key: whole(value) for key, value in optimizer.state_tensors(names).items()}


def alike(rule: str, options: dict[str, Any], counts: list[int], shape: Shape) -> list[dict[str, torch.Tensor]]:
    """The steps of so many matrices of one shape, for several such numbers."""
    return [steps(rule, "shard0", options, shapes=[shape] * count) for count in counts]


def plan_of(rule: str, layout: str) -> str:
    """Who owns what, and what travels together, in this rank's opinion."""
    _, optimizer = build(rule, layout, {}, torch.float32)
    return repr([(index, bucket.stored, bucket.matrices) for index, _, bucket in optimizer._buckets])


def calls_of_a_step(rule: str, layout: str, shapes: list[Shape]) -> int:
    """Exchanges and reductions of this rank in one step."""
    weights, optimizer = build(rule, layout, {}, torch.float32, shapes)
    give_gradients(weights, layout, 1)
    with (
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        optimizer.step()
    return exchange.call_count + reduce.call_count


def missing_gradient_on_one_rank(rule: str) -> bool:
    """A rank without a gradient acts as if its shard of it were zeros."""
    ends = []
    for missing in (True, False):
        weights, optimizer = build(rule, "shard0", {}, torch.float32)
        give_gradients(weights, "shard0", 1)
        if dist.get_rank() == 0:
            for weight in weights[:3]:
                assert isinstance(weight.grad, DTensor)
                if missing:
                    weight.grad = None
                else:
                    weight.grad.to_local().zero_()
        optimizer.step()
        ends.append([whole(w) for w in weights])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def bytes_sent(rule: str, shapes: list[tuple[int, int]], options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes that this rank hands to all-to-all for others in one step and takes from them, and numbers that it has added."""
    mesh = mesh_of(dist.get_world_size())
    weights = [nn.Parameter(distribute_tensor(tensor(i, shape), mesh, [Shard(0)])) for i, shape in enumerate(shapes)]
    optimizer = ShardedOptimizer([{"rule": rule, "params": weights, **options}])
    for i, weight in enumerate(weights):
        weight.grad = distribute_tensor(tensor(100 + i, shapes[i]), mesh, [Shard(0)])
    counted = [0, 0, 0]
    true, add = dist.all_to_all_single, dist.all_reduce

    def adding(numbers: torch.Tensor, **options: Any) -> Any:
        counted[2] += numbers.numel()
        return add(numbers, **options)

    def counting(output: torch.Tensor, input: torch.Tensor, out_sizes: Any, in_sizes: Any, **options: Any) -> Any:
        rank = dist.get_rank()
        counted[0] += sum(in_sizes) - in_sizes[rank]
        counted[1] += sum(out_sizes) - out_sizes[rank]
        return true(output, input, out_sizes, in_sizes, **options)

    dist.all_to_all_single, dist.all_reduce = counting, adding
    try:
        optimizer.step()
    finally:
        dist.all_to_all_single, dist.all_reduce = true, add
    return counted[0], counted[1], counted[2]


def disagree(rule: str, about: str) -> str:
    """What a rank hears when it was given another parameter, rate, or size of buckets than the others."""
    first = dist.get_rank() == 0
    rows = 8 if about != "parameters" or first else 6
    mesh = mesh_of(dist.get_world_size())
    local = torch.zeros(rows // 2, 4)
    weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((rows, 4)), stride=(4, 1)))
    rate = 0.1 if about != "rates" or first else 0.2
    limit = 2**20 if about != "buckets" or first else 2**10
    try:
        ShardedOptimizer([{"rule": rule, "params": [weight], "lr": rate}], bucket_bytes=limit)
    except ValueError as error:
        return str(error)
    return ""


def non_finite(rule: str, value: float) -> tuple[int, bool, bool]:
    """(rejected matrices over all ranks, whether the sick matrix stayed, whether all others moved)."""
    weights, optimizer = build(rule, "shard0", {}, torch.float32)
    give_gradients(weights, "shard0", 1)
    before = [whole(w) for w in weights]
    if dist.get_rank() == 0:
        weights[0].grad.to_local()[0, 0] = value  # type: ignore[union-attr]
    optimizer.step()
    count = torch.tensor([optimizer.take_rejected()])
    dist.all_reduce(count)
    after = [whole(w) for w in weights]
    moved = [not torch.equal(a, b) and bool(b.isfinite().all()) for a, b in zip(before, after, strict=True)]
    return int(count), not moved[0] and bool(after[0].isfinite().all()), all(moved[1:])


def split_or_apart(rule: str, layout: str, together: bool) -> torch.Tensor:
    """A fused weight of blocks of 8, 4 and 6 rows, or three weights."""
    rows = (8, 4, 6)
    parts = [tensor(i, (r, 10), torch.float64) for i, r in enumerate(rows)]
    grads = [[tensor(10 * s + i, (r, 10), torch.float64) for i, r in enumerate(rows)] for s in (1, 2, 3)]
    options = {"rule": rule, "weight_decay": 0.1, "lr": 0.1}
    options |= {"polar_dtype": "fp64"} if hasattr(rule_of(rule).Options, "polar_dtype") else {}
    if together:
        weights = [nn.Parameter(place(torch.cat(parts), layout))]
        optimizer = ShardedOptimizer([{**options, "params": weights, "blocks": list(rows)}])
    else:
        weights = [nn.Parameter(place(part, layout)) for part in parts]
        optimizer = ShardedOptimizer([{**options, "params": weights}])
    for of_step in grads:
        for weight, gradient in zip(weights, [torch.cat(of_step)] if together else of_step, strict=True):
            weight.grad = place(gradient, layout)
        optimizer.step()
    return torch.cat([whole(w) for w in weights])
