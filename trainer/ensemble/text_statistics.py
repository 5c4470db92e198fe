"""What synthetic text is like: documents and their lengths, variety, and how much of it is copied from the training text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.overlap import windows

COPY = 13
"""Tokens of a window that counts as copied where it occurs in the training text."""


def lengths(rows: NDArray[np.int64], bos: int | None, eos: int | None) -> tuple[NDArray[np.int64], int]:
    """Tokens of each document of the rows (n, L + 1) that ends in its row, without its borders; and how many are cut off.

    A tokenizer without an EOS marks beginnings only: a document then ends where the next begins.
    """
    found, cut = [], 0
    mark = eos if eos is not None else bos
    for row in rows:
        at = np.flatnonzero(row[1:] == mark) + 1  # the first token begins a document, whatever it is
        borders = 1 if eos is None or bos in (None, eos) else 2  # the next BOS stands between
        edges = np.concatenate([[-1 if borders == 2 else 0], at])
        between = np.maximum(np.diff(edges) - borders, 0)
        found.append(between[between > 0] if bos == eos else between)  # one id for both stands twice between documents
        cut += int(edges[-1] < len(row) - 1)
    return np.concatenate(found) if found else np.empty(0, np.int64), cut


def described(values: NDArray[np.int64]) -> dict[str, float] | None:
    """Mean and quantiles of lengths; None where there are none."""
    if not len(values):
        return None
    points = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1}
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, q)) for name, q in points.items()}


def distinct(rows: NDArray[np.int64], size: int) -> float:
    """Different n-grams of `size` tokens over all of them; n-grams lie inside one row."""
    every = hashed(rows, size)
    return len(np.unique(every)) / max(len(every), 1)


def hashed(rows: NDArray[np.int64], size: int) -> NDArray[np.uint64]:
    """Hashes of all windows of `size` tokens that lie in one of the rows."""
    whole = windows(rows.ravel(), size)
    width = rows.shape[1]
    starts = np.arange(len(whole)) % width
    return whole[starts <= width - size]


def copied(texts: Sequence[NDArray[np.int64]], training: Iterable[NDArray[np.int64]], size: int = COPY) -> list[float]:
    """For each text (rows, L + 1), the share of its windows that occur in one of the rows of the training text.

    Training rows are what a teacher saw at once: what reaches across two of them it never saw. Memory grows with the texts.
    """
    every = [hashed(text, size) for text in texts]
    known = np.unique(np.concatenate(every))
    seen = np.zeros(len(known), bool)
    for rows in training if len(known) else ():
        here = hashed(rows, size)
        place = np.minimum(np.searchsorted(known, here), len(known) - 1)
        seen[place[known[place] == here]] = True
    return [float(seen[np.searchsorted(known, one)].mean()) if len(one) else 0.0 for one in every]


def summary(rows: NDArray[np.int64], bos: int | None, eos: int | None) -> dict[str, Any]:
    """Documents, lengths and variety of the rows (n, L + 1)."""
    long, cut = lengths(rows, bos, eos)
    return {
        "documents": len(long),
        "documents_cut": cut,
        "document_tokens": described(long),
        **{f"distinct_{size}": distinct(rows[:, 1:], size) for size in (1, 2, 3)},
    }
