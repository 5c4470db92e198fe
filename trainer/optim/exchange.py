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


@dataclass(frozen=True)
class Leg:
    """A piece of an input of a matrix: where it lies in the shard of the rank that holds it, and in the whole matrix."""

    input: int
    matrix: int
    local: tuple[slice, ...]
    whole: tuple[slice, ...]
    shape: tuple[int, int, int]
    alone: bool  # the piece is all of that shard


@dataclass(frozen=True)
class Route:
    """What this rank sends to and takes from each peer: to the owners, back to the shards, and on to the replicas."""

    mine: list[int]
    own: list[Leg]  # pieces that need not travel
    there_out: list[list[Leg]]
    there_in: list[list[Leg]]
    back_out: list[list[Leg]]
    back_in: list[list[Leg]]
    copies_out: list[list[Leg]]
    copies_in: list[list[Leg]]
    travels: bool  # the same on all ranks


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
        there_out, there_in, back_out, back_in = ([[] for _ in range(parts)] for _ in range(4))
        copies_out, copies_in = ([[] for _ in range(crew.copies)] for _ in range(2))
        own: list[Leg] = []
        mine: list[int] = []
        travels = False
        for index, matrix in enumerate(self.matrices):
            stored = self.stored[matrix.parameter]
            team, owner = divmod(matrix.owner, parts)
            if team == crew.copy and owner == me:
                mine.append(index)
            for position, kind in enumerate(kinds):
                replicated = is_replicated(stored, kind)
                travels |= holder_of(matrix, stored, parts) is None or (parts > 1 and replicated)
                at_me = self._leg(position, index, kind, me)
                if at_me is not None and crew.copies > 1:
                    for copy in range(crew.copies):
                        if team == crew.copy != copy:
                            copies_out[copy].append(at_me)
                        elif team == copy != crew.copy:
                            copies_in[copy].append(at_me)
                if team != crew.copy:
                    continue
                if owner != me:
                    if at_me is not None:
                        back_in[owner].append(at_me)
                        if not replicated:
                            there_out[owner].append(at_me)
                    continue
                for rank in range(parts):
                    leg = at_me if rank == me else self._leg(position, index, kind, rank)
                    if leg is None:
                        continue
                    if rank == me:
                        own.append(leg)
                        continue
                    back_out[rank].append(leg)
                    if not replicated:
                        there_in[rank].append(leg)
        return Route(mine, own, there_out, there_in, back_out, back_in, copies_out, copies_in, travels)

    def _leg(self, position: int, index: int, kind: str, rank: int) -> Leg | None:
        matrix = self.matrices[index]
        box, holding = matrix.box(kind), held(self.stored[matrix.parameter], kind, self.crew.parts, rank)
        part = overlap(box, holding)
        if part is None:
            return None
        shape = tuple(stop - start for start, stop in part)
        return Leg(position, index, _within(part, holding), _within(part, box)[1:], shape, part == holding)  # type: ignore[arg-type]


def _within(part: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, outer, strict=True))


def answer(request: Whole, bucket: Bucket, tally: Tensor) -> Generator[None, None, list[list[Tensor]]]:
    """The answer to a request, as a generator that yields while a collective is under way.

    `tally` counts the matrices that the function rejected; the owner counts them, once.
    """
    crew, route, dtypes = bucket.crew, bucket.route(request.kinds), request.dtypes
    local = [[t if t.ndim == 3 else t.unsqueeze(0) for t in tensors] for tensors in request.inputs]
    results: list[list[Tensor | None]] = [[None] * len(bucket.stored) for _ in local]

    def held_piece(leg: Leg) -> Tensor:
        return local[leg.input][bucket.matrices[leg.matrix].parameter][leg.local]

    def settle(leg: Leg, piece: Tensor) -> None:
        """Put a piece of a result where it belongs; a piece that is all of a shard becomes the result, uncopied."""
        parameter = bucket.matrices[leg.matrix].parameter
        if leg.alone:
            results[leg.input][parameter] = piece
            return
        if results[leg.input][parameter] is None:
            shard = local[leg.input][parameter]
            results[leg.input][parameter] = torch.empty(shard.shape, dtype=dtypes[leg.input], device=shard.device)
        results[leg.input][parameter][leg.local].copy_(piece)  # type: ignore[index]

    device = local[0][0].device
    arrived: list[tuple[Leg, Tensor]] = []
    if route.travels:
        parcel = Parcel(route.there_out, dtypes, device)
        for leg, view in parcel.pieces():
            view.copy_(held_piece(leg))
        arrived = yield from parcel.swap(route.there_in, crew.shards)
    back = Parcel(route.back_out, dtypes, device)
    returning: dict[int, list[tuple[Leg, Tensor | None]]] = {index: [] for index in route.mine}
    for leg, view in back.pieces():
        returning[leg.matrix].append((leg, view))
    arriving: dict[int, list[tuple[Leg, Tensor]]] = {index: [] for index in route.mine}
    for leg, piece in arrived:
        arriving[leg.matrix].append((leg, piece))
    for leg in route.own:
        arriving[leg.matrix].append((leg, held_piece(leg)))
        returning[leg.matrix].append((leg, None))  # stays here
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index in route.mine:
        by_shape.setdefault(bucket.matrices[index].shape, []).append(index)
    for (rows, columns), indices in by_shape.items():
        sizes = {"matrix": (rows, columns), "rows": (rows, 1), "columns": (1, columns)}
        stacks = [
            torch.empty((len(indices), *sizes[kind]), dtype=dtype, device=device)
            for kind, dtype in zip(request.kinds, dtypes, strict=True)
        ]
        for row, index in enumerate(indices):
            for leg, piece in arriving.pop(index):
                stacks[leg.input][(row, *leg.whole)].copy_(piece[0])
        outputs, rejected = request.function(*stacks)
        tally += rejected.sum()
        for row, index in enumerate(indices):
            for leg, view in returning.pop(index):
                piece = outputs[leg.input][(row, *leg.whole)].unsqueeze(0)
                if view is None:
                    settle(leg, piece.to(dtypes[leg.input]))
                else:
                    view.copy_(piece)
    del arrived
    if route.travels:
        for leg, piece in (yield from back.swap(route.back_in, crew.shards)):
            settle(leg, piece)
    if crew.copies > 1:
        onward = Parcel(route.copies_out, dtypes, device)
        for leg, view in onward.pieces():
            view.copy_(results[leg.input][bucket.matrices[leg.matrix].parameter][leg.local])  # type: ignore[index]
        for leg, piece in (yield from onward.swap(route.copies_in, crew.replicas)):
            settle(leg, piece)
    return [
        [
            torch.empty_like(shard, dtype=dtypes[k]) if result is None else result.view(shard.shape)
            for shard, result in zip(request.inputs[k], row, strict=True)
        ]
        for k, row in enumerate(results)
    ]


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
