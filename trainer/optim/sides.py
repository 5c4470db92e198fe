"""Low-rank rules: which side of a matrix is compressed, to how many columns, and what that costs. Imports no torch.

A rule sees a matrix in its long layout (l, s): the short side s is compressed, and the long one, l, is sharded. A tall
or square matrix (m, n) is its own long layout; a wide one is seen as (n, m). All of it follows from the shape and the
options, nothing from how the parameter is sharded, so that state can be read by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.optim.plan import Stored, shard_range

Range = tuple[int, int]  # half-open


@dataclass(frozen=True)
class Block:
    """One matrix of a parameter, by its place in the long layout: its range in l, in s, its `rank`, and its places
    among the columns of a factor (l, width) and among the parameter's indices."""

    long: Range
    short: Range
    factor: Range
    indices: Range

    @property
    def rank(self) -> int:
        return self.factor[1] - self.factor[0]


@dataclass(frozen=True)
class Cut:
    """How a parameter is compressed.

    Attributes:
        turned: whether its rows are the short side, so that the long layout is the transpose.
        long, short: sizes of the long layout. Blocks of fused weights lie along the parameter's rows.
        width: columns of a factor.
        indices: how many columns are kept, over all blocks.
    """

    turned: bool
    long: int
    short: int
    width: int
    indices: int
    blocks: tuple[Block, ...]


def cut(rows: int, columns: int, blocks: Sequence[int], rank: int | float) -> Cut:
    """The cut of an (m, n) matrix, or of the blocks of fused weights.

    Args:
        rank: columns kept of each matrix; below 1 a share of its short side, of which at least one is kept.

    Raises:
        ValueError: a rank above the short side, or blocks of which some are tall and some wide.
    """
    if not isinstance(rank, int) and not 0 < rank < 1:
        raise ValueError(f"rank {rank} is no share of the short side; give a whole number, or a share such as 0.25")
    heights = list(blocks) or [rows]
    turned = any(height < columns for height in heights)
    if turned and any(height > columns for height in heights):
        raise ValueError(
            f"blocks of {heights} rows and {columns} columns are tall and wide; all of them must have their short side in "
            "common: leave out 'split' for this weight"
        )
    shorts = heights if turned else [columns] * len(heights)
    ranks = [rank if isinstance(rank, int) else max(1, int(rank * short)) for short in shorts]
    for kept, short in zip(ranks, shorts, strict=True):
        if not 1 <= kept <= short:
            raise ValueError(
                f"rank {kept} does not fit the short side {short} of a {rows} x {columns} weight"
                + (f" in blocks of {heights} rows" if len(heights) > 1 else "")
                + "; give 1 to that, or a share such as 0.25"
            )
    starts = [sum(heights[:i]) for i in range(len(heights) + 1)]
    offsets = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
    found = []
    for i in range(len(heights)):
        along, places = (starts[i], starts[i + 1]), (offsets[i], offsets[i + 1])
        if turned:
            found.append(Block((0, columns), along, places, places))
        else:
            found.append(Block(along, (0, columns), (0, ranks[0]), places))
    long, short = (columns, rows) if turned else (rows, columns)
    return Cut(turned, long, short, offsets[-1] if turned else ranks[0], offsets[-1], tuple(found))


def local(block: tuple[int, int], start: int, length: int) -> slice:
    """The rows of a block within a shard of so many rows that starts at `start`."""
    low, high = (min(max(edge - start, 0), length) for edge in block)
    return slice(low, high)


def travels(stored: Stored, turned: bool, parts: int) -> bool:
    """Whether the sharded side of a parameter is the one to be compressed, so that its shards must be turned."""
    return parts > 1 and stored.dim == (1 if turned else 2)


def factor_returns(stored: Stored, turned: bool, width: int, parts: int) -> bool:
    """Whether the factor travels back rather than the update: where it has fewer columns than a shard has of the short
    side. Else nothing is saved by the low rank on the way back."""
    short = stored.shape[1 if turned else 2]
    return width < -(-short // parts)


def words(stored: Stored, turned: bool, width: int, parts: int) -> list[tuple[int, int]]:
    """Words (sent, received) by each rank of a shard group to turn a parameter, there and back; sums are not in it.

    With the short side of a matrix sharded to s_p = s/P, that is l s_p + l min(s_p, width) words, less what stays.
    """
    if not travels(stored, turned, parts):
        return [(0, 0)] * parts
    experts, rows, columns = stored.shape
    short, long = (rows, columns) if turned else (columns, rows)
    factor = factor_returns(stored, turned, width, parts)
    totals = []
    for rank in range(parts):
        s_p, l_p = (stop - start for start, stop in (shard_range(size, parts, rank) for size in (short, long)))
        out, into = s_p * (long - l_p), l_p * (short - s_p)
        back = (l_p * width * (parts - 1), width * (long - l_p)) if factor else (into, out)  # the product: as it came
        totals.append((experts * (out + back[0]), experts * (into + back[1])))
    return totals
