"""From shards to whole matrices at their owners, and back: unpadded all-to-all, one bucket of parameters at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.plan import Box, Matrix, Stored, held, holder_of, is_replicated, overlap
from trainer.optim.requests import Whole

ALIGNMENT = 16  # bytes: every piece of a buffer can be seen as any dtype
CACHE = 2**20  # bytes of matrices that a CPU works on at a time


@dataclass(frozen=True)
class Crew:
    """The ranks that share a parameter: those that hold its shards, and those that hold copies of the same shard.

    `spread`: whether the copies divide the work among them and exchange results, or each repeat it.
    """

    shards: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    spread: bool = False

    @property
    def parts(self) -> int:
        return dist.get_world_size(self.shards) if self.shards is not None else 1

    @property
    def part(self) -> int:
        return dist.get_rank(self.shards) if self.shards is not None else 0

    @property
    def copies(self) -> int:
        return dist.get_world_size(self.replicas) if self.replicas is not None and self.spread else 1

    @property
    def copy(self) -> int:
        return dist.get_rank(self.replicas) if self.replicas is not None and self.spread else 0

    def counts(self, stored: Stored) -> bool:
        """Whether this rank counts a parameter's matrices, of which each must be counted once: experts by their holder."""
        return self.copy == 0 and (stored.dim == 0 or self.part == 0)


@dataclass(frozen=True)
class Leg:
    """A piece of an input of a matrix: where it lies in the shard of the rank that holds it, and in the whole matrix."""

    input: int
    matrix: int
    parameter: int
    local: tuple[slice, ...]
    whole: tuple[slice, ...]
    shape: tuple[int, ...]
    alone: bool  # it is all of that shard
    known: bool  # the owner has it too: only the result travels


Legs = list[list[Leg]]  # by peer


@dataclass(frozen=True)
class Route:
    """What this rank has to do with the matrices of a bucket."""

    mine: list[int]  # it owns these
    here: list[Leg]  # their pieces on this rank
    owned: Legs  # their pieces on each peer
    held: Legs  # its pieces of each peer's matrices
    copies: Legs  # results that this replica passes on to each other one
    others: Legs  # and takes from each
    travels: bool  # whether the shard group exchanges anything; the same on all ranks


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together: how each lies, and their matrices, numbered within the bucket."""

    crew: Crew
    stored: list[Stored]
    matrices: list[Matrix]
    routes: dict[tuple[str, ...], Route] = field(default_factory=dict)

    def route(self, kinds: tuple[str, ...]) -> Route:
        if kinds not in self.routes:
            self.routes[kinds] = self._route(kinds)
        return self.routes[kinds]

    def _route(self, kinds: tuple[str, ...]) -> Route:
        crew, parts, me = self.crew, self.crew.parts, self.crew.part
        owned, held_, copies, others = ([[] for _ in range(n)] for n in (parts, parts, crew.copies, crew.copies))
        route = Route(
            [], [], owned, held_, copies, others, any(self._travels(m, k) for m in self.matrices for k in kinds)
        )
        for index, matrix in enumerate(self.matrices):
            team, owner = divmod(matrix.owner, parts)
            if (team, owner) == (crew.copy, me):
                route.mine.append(index)
            for position, kind in enumerate(kinds):
                if (team, owner) == (crew.copy, me):
                    for rank, legs in enumerate(route.owned):
                        legs.extend(self._legs(position, index, kind, rank) if rank != me else [])
                for leg in self._legs(position, index, kind, me):
                    if team != crew.copy:
                        route.others[team].append(leg)
                        continue
                    (route.here if owner == me else route.held[owner]).append(leg)
                    for copy, legs in enumerate(route.copies):
                        legs.extend([leg] if copy != team else [])
        return route

    def _travels(self, matrix: Matrix, kind: str) -> bool:
        stored, parts = self.stored[matrix.parameter], self.crew.parts
        return parts > 1 and (holder_of(matrix, stored, parts) is None or is_replicated(stored, kind))

    def _legs(self, position: int, index: int, kind: str, rank: int) -> list[Leg]:
        """The piece of an input that a rank holds, if it holds any."""
        matrix = self.matrices[index]
        stored = self.stored[matrix.parameter]
        box, holding = matrix.box(kind), held(stored, kind, self.crew.parts, rank)
        part = overlap(box, holding)
        if part is None:
            return []
        shape = tuple(stop - start for start, stop in part)
        local, whole = _within(part, holding), _within(part, box)[1:]
        known = is_replicated(stored, kind)
        return [Leg(position, index, matrix.parameter, local, whole, shape, part == holding, known)]


def _within(part: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, outer, strict=True))


def answer(request: Whole, bucket: Bucket, tally: Tensor) -> Generator[None, None, list[list[Tensor]]]:
    """The answer to a request, as a generator that yields while a collective is under way.

    `tally` counts the matrices that the function rejected; the owner counts them, once.
    """
    crew, route, dtypes = bucket.crew, bucket.route(request.kinds), request.dtypes
    shards = [[t if t.ndim == 3 else t.unsqueeze(0) for t in tensors] for tensors in request.inputs]
    results: list[list[Tensor | None]] = [[None] * len(bucket.stored) for _ in shards]
    device = shards[0][0].device

    def settle(leg: Leg, piece: Tensor) -> None:
        """Put a piece of a result where it belongs; a piece that is all of a shard becomes the result, uncopied."""
        row = results[leg.input]
        if leg.alone:
            row[leg.parameter] = piece
            return
        if row[leg.parameter] is None:
            row[leg.parameter] = torch.empty_like(shards[leg.input][leg.parameter], dtype=dtypes[leg.input])
        row[leg.parameter][leg.local].copy_(piece)  # type: ignore[index]

    arriving = [(leg, shards[leg.input][leg.parameter][leg.local]) for leg in route.here]
    if route.travels:
        parcel = Parcel([[leg for leg in legs if not leg.known] for legs in route.held], dtypes, device)
        for leg, view in parcel.pieces():
            view.copy_(shards[leg.input][leg.parameter][leg.local])
        incoming = [[leg for leg in legs if not leg.known] for legs in route.owned]
        arriving += yield from parcel.swap(incoming, crew.shards)
    whole = compute(request, bucket, arriving, tally)
    del arriving
    for leg in route.here:
        settle(leg, whole[leg.input, leg.matrix][leg.whole].unsqueeze(0))
    if route.travels:
        parcel = Parcel(route.owned, dtypes, device)
        for leg, view in parcel.pieces():
            view.copy_(whole[leg.input, leg.matrix][leg.whole])
        del whole  # what stays here is held by the results
        for leg, piece in (yield from parcel.swap(route.held, crew.shards)):
            settle(leg, piece)
    if crew.copies > 1:
        parcel = Parcel(route.copies, dtypes, device)
        for leg, view in parcel.pieces():
            view.copy_(results[leg.input][leg.parameter][leg.local])  # type: ignore[index]
        for leg, piece in (yield from parcel.swap(route.others, crew.replicas)):
            settle(leg, piece)
    return [
        [
            torch.empty_like(shard, dtype=dtypes[k]) if result is None else result.view(shard.shape)
            for shard, result in zip(request.inputs[k], row, strict=True)
        ]
        for k, row in enumerate(results)
    ]


def compute(
    request: Whole, bucket: Bucket, arriving: list[tuple[Leg, Tensor]], tally: Tensor
) -> dict[tuple[int, int], Tensor]:
    """Put this rank's matrices together, those of one shape in one stack, and apply the function; by (input, matrix).

    On a CPU a few matrices at a time, so that the passes over them stay in its cache; how many makes no difference.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index in bucket.route(request.kinds).mine:
        by_shape.setdefault(bucket.matrices[index].shape, []).append(index)
    whole: dict[tuple[int, int], Tensor] = {}
    stacks: list[list[Tensor]] = []
    for (rows, columns), indices in by_shape.items():
        sizes = {"matrix": (rows, columns), "rows": (rows, 1), "columns": (1, columns)}
        stacks.append([])
        for position, (kind, dtype) in enumerate(zip(request.kinds, request.dtypes, strict=True)):
            stacks[-1].append(torch.empty((len(indices), *sizes[kind]), dtype=dtype, device=tally.device))
            whole |= {(position, index): stacks[-1][-1][n] for n, index in enumerate(indices)}
    for leg, piece in arriving:
        whole[leg.input, leg.matrix][leg.whole].copy_(piece[0])
    for stack in stacks:
        size = len(stack[0]) if tally.is_cuda else max(1, CACHE // stack[0][0].nbytes)
        for chunk in zip(*(tensor.split(size) for tensor in stack), strict=True):
            outputs, rejected = request.function(*chunk)
            tally += rejected.sum()
            for target, output in zip(chunk, outputs, strict=True):
                target.copy_(output)
    return whole


class Parcel:
    """One flat buffer for all peers, with a view for each piece."""

    def __init__(self, legs: list[list[Leg]], dtypes: tuple[Any, ...], device: torch.device) -> None:
        self.legs, self.dtypes, self.device = legs, dtypes, device
        self.sizes = [sum(self._bytes(leg) for leg in of_peer) for of_peer in legs]
        self.buffer = torch.empty(sum(self.sizes), dtype=torch.uint8, device=device)

    def _bytes(self, leg: Leg) -> int:
        size = leg.shape[0] * leg.shape[1] * leg.shape[2] * self.dtypes[leg.input].itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    def pieces(self) -> list[tuple[Leg, Tensor]]:
        result, offset = [], 0
        for of_peer in self.legs:
            for leg in of_peer:
                dtype = self.dtypes[leg.input]
                size = leg.shape[0] * leg.shape[1] * leg.shape[2] * dtype.itemsize
                result.append((leg, self.buffer[offset : offset + size].view(dtype).view(leg.shape)))
                offset += self._bytes(leg)
        return result

    def swap(
        self, incoming: list[list[Leg]], group: dist.ProcessGroup | None
    ) -> Generator[None, None, list[tuple[Leg, Tensor]]]:
        """Send this parcel, and return the pieces of the one that comes in for it."""
        other = Parcel(incoming, self.dtypes, self.device)
        work = dist.all_to_all_single(other.buffer, self.buffer, other.sizes, self.sizes, group=group, async_op=True)
        yield
        work.wait()
        return other.pieces()
