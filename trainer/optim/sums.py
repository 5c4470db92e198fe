"""Sums over the shards of each matrix: one small reduction for all of a bucket."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.exchange import Bucket
from trainer.optim.plan import held, overlap
from trainer.optim.requests import Sum


def add(request: Sum, bucket: Bucket, tally: Tensor) -> Generator[None, None, list[Tensor]]:
    """The answer to a request, as a generator that yields while the reduction is under way.

    `tally` counts the rejected matrices, each on one rank of its crew.
    """
    dtype = request.dtype or torch.float64
    if request.of == "parts":
        return (yield from over_shards([value.to(dtype) for value in request.values], bucket))
    totals = [_totals(value, bucket, index, dtype, request.power) for index, value in enumerate(request.values)]
    totals = yield from over_shards(totals, bucket)
    if request.sound:
        for stored, total in zip(bucket.stored, totals, strict=True):
            if bucket.crew.counts(stored):
                tally += (~total.isfinite()).sum()
    if request.mean:
        for index, (stored, total) in enumerate(zip(bucket.stored, totals, strict=True)):
            for block, matrix in enumerate(m for m in stored.matrices(index) if not m.expert):
                total[..., block] /= math.prod(matrix.shape)  # a tensor of these would wait for the device
    return [_spread(s, v, bucket, i) for i, (s, v) in enumerate(zip(totals, request.values, strict=True))]


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


def _totals(value: Tensor, bucket: Bucket, index: int, dtype: torch.dtype, power: int) -> Tensor:
    """What a shard adds to the sum of each block of each of its matrices: (..., blocks)."""
    ranges = _rows(bucket, index)
    rows = value.sum(-1, dtype=dtype) if power == 1 else _squares(value, dtype)  # (..., m_p)
    if len(ranges) == 1:
        return rows.sum(-1, keepdim=True)
    return torch.stack([rows[..., start:stop].sum(-1) for start, stop in ranges], -1)


def _squares(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of squares of each row. A CPU adds them in the values' own dtype, which takes half of the time, if no sum
    comes near to its range."""
    if value.device.type == "cpu" and value.numel():
        norms = torch.linalg.vector_norm(value, dim=-1)
        if norms.numpy().min() > 1e-15 and norms.numpy().max() < 1e15:
            return norms.to(dtype).square_()
    return torch.linalg.vector_norm(value, dim=-1, dtype=dtype).square_()


def _spread(sums: Tensor, value: Tensor, bucket: Bucket, index: int) -> Tensor:
    """The sums (..., blocks) where each belongs: (..., 1, 1), or one per row of the shard."""
    ranges = _rows(bucket, index)
    if len(ranges) == 1:
        return sums.unsqueeze(-1)
    pieces = [sums[..., b : b + 1].expand(*sums.shape[:-1], stop - start) for b, (start, stop) in enumerate(ranges)]
    return torch.cat(pieces, -1).unsqueeze(-1)  # (..., m_p, 1)
