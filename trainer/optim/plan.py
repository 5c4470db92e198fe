"""Who orthogonalizes what, and what travels: plans from shapes alone. Imports no torch.

A parameter is seen as (E, m, n): E independent matrices (1 for a 2-D parameter), rows are outputs. Fused weights are cut
into blocks of rows; every block of every matrix is one `Matrix`, the unit of ownership.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # half-open ranges in (E, m, n)


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of the `index`-th of `parts` shards of a dimension, as FSDP2 and DTensor cut it."""
    chunk = -(-size // parts)
    return min(index * chunk, size), min((index + 1) * chunk, size)


@dataclass(frozen=True)
class Stored:
    """How a parameter lies: its shape as (E, m, n), which of the three is sharded (None: whole on every rank), and the
    rows of its blocks (empty: one block)."""

    shape: tuple[int, int, int]
    dim: int | None
    blocks: tuple[int, ...] = ()

    def matrices(self, parameter: int) -> Iterator[Matrix]:
        """All of its matrices; `parameter` is its number."""
        for expert in range(self.shape[0]):
            start = 0
            for block, rows in enumerate(self.blocks or (self.shape[1],)):
                yield Matrix(parameter, expert, block, (start, start + rows), self.shape[2])
                start += rows


@dataclass(frozen=True)
class Matrix:
    """One matrix to be orthogonalized, and the rank that does it."""

    parameter: int
    expert: int
    block: int
    rows: tuple[int, int]
    columns: int
    owner: int = -1

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns

    def box(self, kind: str) -> Box:
        """Where the matrix, or its statistics, lie in an input of the parameter."""
        rows = {"matrix": self.rows, "rows": self.rows, "columns": (self.block, self.block + 1)}[kind]
        return (self.expert, self.expert + 1), rows, (0, 1 if kind == "rows" else self.columns)


def work(shape: tuple[int, int]) -> int:
    """Multiplications of one Newton-Schulz step."""
    short, long = sorted(shape)
    return 4 * short * short * long + 2 * short**3


def held(stored: Stored, kind: str, parts: int, rank: int) -> Box:
    """What a rank holds of an input of a parameter. Statistics are replicated along the dimension that they lack."""
    experts, rows, columns = stored.shape
    if kind == "rows":
        columns = 1
    if kind == "columns":
        rows = max(len(stored.blocks), 1)
    box = [(0, experts), (0, rows), (0, columns)]
    if not is_replicated(stored, kind):
        assert stored.dim is not None
        box[stored.dim] = shard_range(box[stored.dim][1], parts, rank)
    return box[0], box[1], box[2]


def is_replicated(stored: Stored, kind: str) -> bool:
    """Whether every rank of the shard group holds all of this input."""
    return stored.dim is None or (kind == "rows" and stored.dim == 2) or (kind == "columns" and stored.dim == 1)


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None if it is empty."""
    (e, r, c) = ((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return (e, r, c) if e[0] < e[1] and r[0] < r[1] and c[0] < c[1] else None


def own(parameters: Sequence[Stored], parts: int, replicas: int = 1) -> list[Matrix]:
    """Every matrix with its owner, dearest first: longest processing time first over all ranks.

    Owner `r * parts + p` is shard rank p of replica r. A matrix that one shard rank holds alone stays there, and costs
    no exchange.
    """
    loads = [0] * (parts * replicas)
    free: list[Matrix] = []
    placed: list[Matrix] = []
    for index, stored in enumerate(parameters):
        for matrix in stored.matrices(index):
            holder = holder_of(matrix, stored, parts)
            if holder is None:
                free.append(matrix)
                continue
            owner = min(range(holder, parts * replicas, parts), key=loads.__getitem__)
            loads[owner] += work(matrix.shape)
            placed.append(replace(matrix, owner=owner))
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for matrix in sorted(free, key=_dearest_first):
        load, owner = heap[0]
        heapq.heapreplace(heap, (load + work(matrix.shape), owner))
        placed.append(replace(matrix, owner=owner))
    return sorted(placed, key=_dearest_first)


def _dearest_first(matrix: Matrix) -> tuple[int, int, int, int]:
    return -work(matrix.shape), matrix.parameter, matrix.expert, matrix.block


def holder_of(matrix: Matrix, stored: Stored, parts: int) -> int | None:
    """The one shard rank that holds all of the matrix, if there is one."""
    if stored.dim is None:
        return 0
    chunk = -(-stored.shape[stored.dim] // parts)
    start, stop = matrix.box("matrix")[stored.dim]
    return start // chunk if stop <= (start // chunk + 1) * chunk else None


def buckets(
    parameters: Sequence[Stored], parts: int, limit: int, width: int, whole: Sequence[int] | None = None
) -> list[list[int]]:
    """Parameters in the order of their work, cut so that no rank moves more than `limit` bytes of shards at a time.

    `width` is the bytes of an entry on the way. The limit is at least the bytes of the largest matrix: its owner needs
    that much anyway, and a bucket then has a matrix for every rank. `whole` are bytes that a parameter takes on every rank
    beside its shard; a bucket has at most four times the limit of them, or one parameter.
    """
    sizes = [width * experts * rows * columns for experts, rows, columns in (p.shape for p in parameters)]
    dearest = [min(map(_dearest_first, p.matrices(i))) for i, p in enumerate(parameters)]
    limit = max([limit, *(width * math.prod(m.shape) for i, p in enumerate(parameters) for m in p.matrices(i))])
    result: list[list[int]] = []
    room = 0
    for index in sorted(range(len(parameters)), key=dearest.__getitem__):
        size = sizes[index] if parameters[index].dim is None else -(-sizes[index] // parts)
        size += whole[index] // 4 if whole else 0
        if not result or size > room:
            result.append([])
            room = limit
        result[-1].append(index)
        room -= size
    return result


def imbalance(matrices: Sequence[Matrix], ranks: int) -> float:
    """Work of the busiest rank over that of the mean rank."""
    loads = [0] * ranks
    for matrix in matrices:
        loads[matrix.owner] += work(matrix.shape)
    return max(loads) * ranks / sum(loads)


def traffic(parameters: Sequence[Stored], matrices: Sequence[Matrix], parts: int, width: int) -> list[tuple[int, int]]:
    """Bytes (sent, received) of matrix entries by each rank of a shard group in one step: to the owners and back."""
    totals = [[0, 0] for _ in range(parts)]
    for matrix in matrices:
        owner, stored = matrix.owner % parts, parameters[matrix.parameter]
        if is_replicated(stored, "matrix"):
            continue
        for rank in range(parts):
            part = overlap(matrix.box("matrix"), held(stored, "matrix", parts, rank))
            if part is None or rank == owner:
                continue
            size = width * (part[1][1] - part[1][0]) * (part[2][1] - part[2][0])
            for peer in (rank, owner):  # there and back: what goes one way comes the other
                totals[peer][0] += size
                totals[peer][1] += size
    return [(sent, received) for sent, received in totals]


def volumes(
    parameters: Sequence[Stored], matrices: Sequence[Matrix], parts: int, copies: int, width: int, kind: str = "matrix"
) -> list[tuple[int, int]]:
    """Bytes (sent, received) of one input and its result by each rank in one step, rank `copy * parts + part`.

    As `traffic`, and with what replicas pass on to each other, and for the statistics of rows or columns too. The time
    it takes grows with ranks plus matrices, not with their product: matrices that lie alike are counted together.

    Args:
        copies: replicas that divide the matrices (1 where each repeats the work).
        width: bytes of an entry on the way.
    """
    alike: dict[tuple[object, ...], list[Matrix]] = {}
    for matrix in matrices:
        stored = parameters[matrix.parameter]
        expert = matrix.expert if stored.dim == 0 else 0
        key = (stored.shape, stored.dim, stored.blocks, matrix.block, expert, matrix.owner // parts)
        alike.setdefault(key, []).append(matrix)
    sent, received = [0] * (parts * copies), [0] * (parts * copies)
    for group in alike.values():
        stored, first = parameters[group[0].parameter], group[0].owner // parts * parts
        if is_replicated(stored, kind):
            whole = width * _entries(group[0].box(kind))
            pieces = dict.fromkeys(range(parts), 0)  # the owner has the input already
            for part in range(parts):
                received[first + part] += whole * len(group)
            for matrix in group:
                received[matrix.owner] -= whole
                sent[matrix.owner] += whole * (parts - 1)
            passed_on = dict.fromkeys(range(parts), whole)
        else:
            boxes = ((part, overlap(group[0].box(kind), held(stored, kind, parts, part))) for part in range(parts))
            pieces = {part: width * _entries(box) for part, box in boxes if box is not None}
            passed_on, total = pieces, sum(pieces.values())
            for totals in (sent, received):  # there and back: what goes one way comes the other
                for part, size in pieces.items():
                    totals[first + part] += size * len(group)
                for matrix in group:
                    totals[matrix.owner] += total - 2 * pieces.get(matrix.owner % parts, 0)
        for part, size in passed_on.items() if copies > 1 else ():
            sent[first + part] += size * len(group) * (copies - 1)
            for copy in range(copies):
                if copy * parts != first:
                    received[copy * parts + part] += size * len(group)
    return list(zip(sent, received, strict=True))


def _entries(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
