"""How much of the text that is held back occurs in the training text, too: the share of its windows of 50 tokens.

Splits are disjoint by documents; documents of real text quote each other, and share licences and headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 50
_BASE = np.uint64(0x9E3779B97F4A7C15)


def seen_in_training(parts: list[Path], splits: tuple[str, ...]) -> dict[str, float]:
    """For each split the share of its windows that occur in the training tokens; 0.0 for a split shorter than one.

    Memory grows with the largest split (some 30 bytes per token) and with one part, not with the training text.
    """
    found = {}
    for split in splits:
        held_back = np.concatenate([windows(tokens) for tokens in _tokens(parts, split)])
        known, again = np.unique(held_back, return_inverse=True)
        seen = np.zeros(len(known), bool)
        for tokens in _tokens(parts, "train") if len(known) else ():
            here = windows(tokens)
            place = np.minimum(np.searchsorted(known, here), len(known) - 1)
            seen[place[known[place] == here]] = True
        found[split] = float(seen[again].mean()) if len(known) else 0.0
    return found


def windows(tokens: NDArray[Any], size: int = WINDOW) -> NDArray[np.uint64]:
    """A 64-bit hash of each window of `size` tokens: a polynomial modulo 2^64, its parts put together by doubling."""
    if len(tokens) < size:
        return np.empty(0, np.uint64)
    powers = {1: _mixed(tokens)}
    part = 1
    with np.errstate(over="ignore"):
        while 2 * part <= size:
            powers[2 * part] = _joined(powers[part], part, powers[part], part)
            part *= 2
        whole, length = powers[part], part
        for more in sorted(powers, reverse=True)[1:]:
            if length + more <= size:
                whole, length = _joined(whole, length, powers[more], more), length + more
    return whole


def _joined(left: NDArray[np.uint64], size: int, right: NDArray[np.uint64], more: int) -> NDArray[np.uint64]:
    """Hashes of windows of `size + more` tokens, from those of both lengths at every place."""
    factor = np.uint64(pow(int(_BASE), more, 1 << 64))
    count = len(left) - more
    return left[:count] * factor + right[size : size + count]


def _mixed(tokens: NDArray[Any]) -> NDArray[np.uint64]:
    """Tokens as numbers that share no structure with each other (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        value = tokens.astype(np.uint64) + _BASE
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _tokens(parts: list[Path], split: str) -> Iterator[NDArray[Any]]:
    for part in parts:
        with np.load(part, allow_pickle=False) as arrays:
            yield arrays[f"{split}_tokens"]
