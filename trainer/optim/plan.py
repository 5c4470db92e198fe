"""Plans from shapes alone. Imports no torch."""

from __future__ import annotations


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of the `index`-th of `parts` shards of a dimension, as FSDP2 and DTensor cut it."""
    chunk = -(-size // parts)
    return min(index * chunk, size), min((index + 1) * chunk, size)
