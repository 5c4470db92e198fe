"""Sums over the shards of each matrix: one small reduction for all of a bucket."""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.exchange import Bucket
from trainer.optim.plan import held, overlap
from trainer.optim.requests import Sum


def add(request: Sum, bucket: Bucket) -> Generator[None, None, list[Tensor]]:
    """The answer to a request, as a generator that yields while the reduction is under way."""
    dtype = request.dtype or torch.float64
    if request.of == "parts":
        sums = [value.to(dtype) for value in request.values]
    else:
        sums = [_totals(value, bucket, index, dtype) for index, value in enumerate(request.values)]
    sums = yield from over_shards(sums, bucket)
    return (
        sums
        if request.of == "parts"
        else [_spread(s, v, bucket, i) for i, (s, v) in enumerate(zip(sums, request.values, strict=True))]
    )


def over_shards(parts: list[Tensor], bucket: Bucket) -> Generator[None, None, list[Tensor]]:
    """Each tensor added over the ranks that hold shards of its parameter; where a rank holds whole matrices, itself."""
    cut = [index for index, stored in enumerate(bucket.stored) if stored.dim in (1, 2)]
    if bucket.crew.parts == 1 or not cut:
        return parts
    flat = torch.cat([parts[index].flatten() for index in cut])
    work = dist.all_reduce(flat, group=bucket.crew.shards, async_op=True)
    yield
    work.wait()
    result = list(parts)
    for index, piece in zip(cut, flat.split([parts[index].numel() for index in cut]), strict=True):
        result[index] = piece.view(parts[index].shape)
    return result


def _rows(bucket: Bucket, index: int) -> list[tuple[int, int]]:
    """Where each block of a parameter lies in the rows of this rank's shard; empty ranges for blocks that do not."""
    stored = bucket.stored[index]
    mine = held(stored, "matrix", bucket.crew.parts, bucket.crew.part)
    start = mine[1][0]
    found = []
    for matrix in stored.matrices(index):
        if matrix.expert:
            break
        common = overlap(((0, 1), matrix.rows, (0, 1)), ((0, 1), mine[1], (0, 1)))
        found.append((common[1][0] - start, common[1][1] - start) if common else (0, 0))
    return found


def _totals(value: Tensor, bucket: Bucket, index: int, dtype: torch.dtype) -> Tensor:
    """What a shard adds to the sum of each block of each of its matrices: (..., blocks)."""
    ranges = _rows(bucket, index)
    if len(ranges) == 1:
        return value.sum((-2, -1), dtype=dtype).unsqueeze(-1)
    rows = value.sum(-1, dtype=dtype)  # (..., m_p)
    return torch.stack([rows[..., start:stop].sum(-1) for start, stop in ranges], -1)


def _spread(sums: Tensor, value: Tensor, bucket: Bucket, index: int) -> Tensor:
    """The sums (..., blocks) where each belongs: (..., 1, 1), or one per row of the shard."""
    ranges = _rows(bucket, index)
    if len(ranges) == 1:
        return sums.unsqueeze(-1)
    pieces = [sums[..., b : b + 1].expand(*sums.shape[:-1], stop - start) for b, (start, stop) in enumerate(ranges)]
    return torch.cat(pieces, -1).unsqueeze(-1)  # (..., m_p, 1)
