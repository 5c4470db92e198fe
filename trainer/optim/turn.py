"""From shards along the short side of a matrix to shards along the long one, by all-to-all, and back."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from trainer.optim.exchange import Bucket, Leg, Parcel
from trainer.optim.plan import held, shard_range
from trainer.optim.requests import Expand, Turn
from trainer.optim.sides import Cut, factor_returns, local, travels


def turn(request: Turn, bucket: Bucket) -> Generator[None, None, list[tuple[Tensor, int]]]:
    """The answer to a request, as a generator that yields while a collective is under way."""
    crew, parts = bucket.crew, bucket.crew.parts
    shards = [long_view(value, turned) for value, turned in zip(request.values, request.turned, strict=True)]
    moving = [i for i, turned in enumerate(request.turned) if travels(bucket.stored[i], turned, parts)]
    starts = [0 if i in moving else _start(bucket, i, turned) for i, turned in enumerate(request.turned)]
    if not moving:
        return list(zip(shards, starts, strict=True))
    dtypes = tuple(shard.dtype for shard in shards)
    leaving: list[list[Leg]] = [[] for _ in range(parts)]
    coming: list[list[Leg]] = [[] for _ in range(parts)]
    results = {}
    for i in moving:
        long, short = _sizes(bucket, i, request.turned[i])
        rows, columns = shard_range(long, parts, crew.part), shard_range(short, parts, crew.part)
        starts[i], experts = rows[0], len(shards[i])
        results[i] = shards[i].new_empty(experts, rows[1] - rows[0], short)
        for peer in range(parts):
            theirs = shard_range(long, parts, peer), shard_range(short, parts, peer)
            leaving[peer] += _leg(i, experts, theirs[0], (0, columns[1] - columns[0]))
            coming[peer] += _leg(i, experts, (0, rows[1] - rows[0]), theirs[1])
    yield from _swap(leaving, coming, dtypes, shards, results, bucket)
    return [(results.get(i, shard), start) for i, (shard, start) in enumerate(zip(shards, starts, strict=True))]


def expand(request: Expand, bucket: Bucket, tally: Tensor) -> Generator[None, None, None]:
    """Carry a request out, as a generator that yields while a collective is under way.

    `tally` counts the rejected matrices, each on one rank of its crew.
    """
    crew, parts = bucket.crew, bucket.crew.parts
    for stored, rejected in zip(bucket.stored, request.rejected, strict=bool(request.rejected)):
        if crew.counts(stored):
            tally += sum(of_block.sum() for of_block in rejected)
    turned = [cut.turned for cut in request.cuts]
    moving = [i for i, flag in enumerate(turned) if travels(bucket.stored[i], flag, parts)]
    whole = [i for i in moving if factor_returns(bucket.stored[i], turned[i], request.cuts[i].width, parts)]
    sources = list(request.factors)
    for i in moving:
        if i not in whole:  # the product travels
            start = shard_range(request.cuts[i].long, parts, crew.part)[0]
            sources[i] = request.factors[i].new_zeros(*request.factors[i].shape[:2], request.cuts[i].short)
            multiply(sources[i], request.factors[i], request.vectors[i], request.cuts[i], 0.0, 1.0, start)
    results: dict[int, Tensor] = {}
    if moving:
        leaving: list[list[Leg]] = [[] for _ in range(parts)]
        coming: list[list[Leg]] = [[] for _ in range(parts)]
        for i in moving:
            cut, experts = request.cuts[i], len(sources[i])
            rows, columns = shard_range(cut.long, parts, crew.part), shard_range(cut.short, parts, crew.part)
            mine = (0, cut.width) if i in whole else (0, columns[1] - columns[0])
            results[i] = sources[i].new_empty(experts, cut.long, mine[1])
            for peer in range(parts):
                theirs = mine if i in whole else shard_range(cut.short, parts, peer)
                leaving[peer] += _leg(i, experts, (0, rows[1] - rows[0]), theirs)
                coming[peer] += _leg(i, experts, shard_range(cut.long, parts, peer), mine)
        yield from _swap(leaving, coming, tuple(s.dtype for s in sources), sources, results, bucket)
    for i, weight in enumerate(request.weights):
        target = long_view(weight, turned[i])
        if i in moving and i not in whole:
            _add(target, results[i], request.keep, request.by)
            continue
        columns = shard_range(request.cuts[i].short, parts, crew.part) if i in whole else None
        factor = results.get(i, request.factors[i])
        start = 0 if i in whole else _start(bucket, i, turned[i])
        multiply(target, factor, request.vectors[i], request.cuts[i], request.keep, request.by, start, columns)


def multiply(
    target: Tensor, factor: Tensor, vectors: list[Tensor], cut: Cut, keep: float, by: float, start: int,
    columns: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """T <- keep T + by (factor x vectors), block by block, in place.

    Args:
        target: (E_p, l_p, s), or only those `columns` of it.
        factor: (E_p, l_p, width).
        vectors: per block (E_p, r, s of the block).
        start: the first row of the shard in the long layout.
    """
    for block, rows_of in zip(cut.blocks, vectors, strict=True):
        rows = local(block.long, start, target.shape[1])
        low, high = columns or (0, cut.short)
        low, high = max(low, block.short[0]), min(high, block.short[1])
        if high <= low:
            continue
        piece = target[:, rows, low - (columns or (0,))[0] : high - (columns or (0,))[0]]
        left = factor[:, rows, slice(*block.factor)]
        right = rows_of[..., low - block.short[0] : high - block.short[0]]
        if piece.dtype == left.dtype and len(piece) == 1:
            piece[0].addmm_(left[0], right[0], beta=keep, alpha=by)
        elif piece.dtype == left.dtype:
            piece.baddbmm_(left, right, beta=keep, alpha=by)
        else:
            _add(piece, left @ right, keep, by)


def long_view(value: Tensor, turned: bool) -> Tensor:
    """A shard as (E_p, ., .), transposed where the long layout is."""
    value = value if value.ndim == 3 else value.unsqueeze(0)
    return value.mT if turned else value


def _add(target: Tensor, product: Tensor, keep: float, by: float) -> None:
    """T <- keep T + by product; narrower weights are rounded once."""
    wide = target.to(product.dtype)
    wide.mul_(keep).add_(product, alpha=by)
    if wide is not target:
        target.copy_(wide)


def _sizes(bucket: Bucket, index: int, turned: bool) -> tuple[int, int]:
    _, rows, columns = bucket.stored[index].shape
    return (columns, rows) if turned else (rows, columns)


def _start(bucket: Bucket, index: int, turned: bool) -> int:
    """The first row of the long layout that a rank holds of a parameter as it lies."""
    return held(bucket.stored[index], "matrix", bucket.crew.parts, bucket.crew.part)[2 if turned else 1][0]


def _leg(index: int, experts: int, rows: tuple[int, int], columns: tuple[int, int]) -> list[Leg]:
    """A piece of a parameter in the long layout, none if it is empty."""
    place = (slice(None), slice(*rows), slice(*columns))
    shape = (experts, rows[1] - rows[0], columns[1] - columns[0])
    return [Leg(index, index, index, place, place, shape, False, False)] if min(shape) > 0 else []


def _swap(
    leaving: list[list[Leg]], coming: list[list[Leg]], dtypes: tuple[torch.dtype, ...], sources: list[Tensor],
    results: dict[int, Tensor], bucket: Bucket,
) -> Generator[None, None, None]:  # fmt: skip
    """Exchange pieces with all peers; what stays here is copied."""
    me = bucket.crew.part
    for here, there in zip(leaving[me], coming[me], strict=True):
        results[there.parameter][there.whole].copy_(sources[here.parameter][here.local])
    leaving[me], coming[me] = [], []
    parcel = Parcel(leaving, dtypes, sources[0].device)
    for leg, view in parcel.pieces():
        view.copy_(sources[leg.parameter][leg.local])
    for leg, piece in (yield from parcel.swap(coming, bucket.crew.shards)):
        results[leg.parameter][leg.whole].copy_(piece)
