"""From row shards to whole matrices and back: here by one gather to all ranks, each of which does all the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.plan import shard_range
from trainer.optim.requests import Whole

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Layout:
    """How the matrices of one request lie: global shapes per input, the sharded dimension, and the group of ranks."""

    shapes: list[list[tuple[int, ...]]]
    dims: list[list[int | None]]
    group: dist.ProcessGroup | None


def answer(request: Whole, layout: Layout) -> list[list[Tensor]]:
    """Gather every input, apply the function to batches of equal shapes, and cut this rank's shards out of the results."""
    wholes = [
        _gather(shards, shapes, dims, layout.group)
        for shards, shapes, dims in zip(request.inputs, layout.shapes, layout.dims, strict=True)
    ]
    count = len(request.inputs[0])
    results: list[list[Tensor]] = [[torch.empty(0)] * count for _ in wholes]
    batches: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(layout.shapes[0]):
        batches.setdefault(shape, []).append(index)
    for indices in batches.values():
        stacks = [torch.stack([whole[i] for i in indices]) for whole in wholes]
        flat = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]  # 3-D parameters are matrices too
        for k, (result, stack) in enumerate(zip(request.function(*flat), stacks, strict=True)):
            for row, i in enumerate(indices):
                whole = result.reshape(stack.shape)[row]
                results[k][i] = _cut(whole, layout.dims[k][i], layout.group)
    return results


def _cut(whole: Tensor, dim: int | None, group: dist.ProcessGroup | None) -> Tensor:
    if dim is None or group is None:
        return whole
    start, stop = shard_range(whole.shape[dim], dist.get_world_size(group), dist.get_rank(group))
    return whole.narrow(dim, start, stop - start)


def _gather(
    shards: list[Tensor], shapes: list[tuple[int, ...]], dims: list[int | None], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Whole tensors from the shards of all ranks, in one collective; replicated ones are taken as they are."""
    sharded = [i for i, dim in enumerate(dims) if dim is not None]
    if group is None or not sharded:
        return shards
    world = dist.get_world_size(group)
    pieces: list[list[tuple[int, ...]]] = []  # per rank, the shape of each piece
    for rank in range(world):
        of_rank = []
        for i in sharded:
            shape, dim = list(shapes[i]), dims[i]
            assert dim is not None
            start, stop = shard_range(shape[dim], world, rank)
            shape[dim] = stop - start
            of_rank.append(tuple(shape))
        pieces.append(of_rank)
    sizes = [sum(torch.Size(shape).numel() for shape in of_rank) for of_rank in pieces]
    send = shards[sharded[0]].new_zeros(max(sizes))
    send[: sizes[dist.get_rank(group)]] = torch.cat([shards[i].reshape(-1) for i in sharded])
    received = send.new_empty(world * send.numel())
    _all_gather(received, send, group=group)
    columns: list[list[Tensor]] = [[] for _ in sharded]
    for rank, buffer in enumerate(received.chunk(world)):
        counts = [torch.Size(shape).numel() for shape in pieces[rank]]
        for k, piece in enumerate(buffer[: sizes[rank]].split(counts)):
            columns[k].append(piece.view(pieces[rank][k]))
    wholes = list(shards)
    for k, i in enumerate(sharded):
        dim = dims[i]
        assert dim is not None
        wholes[i] = torch.cat(columns[k], dim=dim)
    return wholes
