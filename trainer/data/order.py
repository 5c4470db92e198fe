"""The order of the data: a keyed permutation per epoch, computed at any position without a table.

A balanced Feistel network permutes the smallest domain of 4^k >= n; walking along its cycle until the value is below n
gives a permutation of range(n). O(1) per index: seeking costs nothing, and no memory grows with the data.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10


def permute(indices: NDArray[np.int64], n: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """The images of `indices` (each in [0, n)) under the permutation of range(n) that `key` names."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    base = _mix(np.uint64((key[0] * 0x9E3779B97F4A7C15 + key[1] * 0xD1B54A32D192ED03 + n) % 2**64))
    keys = [_mix(base + np.uint64(r)) for r in range(1, ROUNDS + 1)]
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> shift, values[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        moved = (left << shift) | right
        values[walking] = moved
        walking = walking[moved >= n]
    return values.astype(np.int64)


def sequence_ids(indices: NDArray[np.int64], n: int, order_seed: int, *, reshuffle: bool = True) -> NDArray[np.int64]:
    """Ids of the sequences at `indices` of the endless stream over n sequences: one pass after another over all of them.

    With `reshuffle` each pass has an order of its own, else all have that of the first.
    """
    epochs, places = np.divmod(indices, n)
    ids = np.empty_like(indices)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(places[here], n, (order_seed, int(epoch) if reshuffle else 0))
    return ids


def name_seed(seed: int, name: str) -> int:
    """64 bits from a seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64] | np.uint64:
    """splitmix64's finalizer: every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
