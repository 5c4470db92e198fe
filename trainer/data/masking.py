"""Documents in packed rows: where each begins, the position of each token in its own, and targets that cross a border.

A document is BOS, tokens, EOS, as far as the tokenizer has them. With a BOS a document begins there. Without one, the EOS
that ends a document is also all the context that the first token of the next has: it is taken to begin the next.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Borders(NamedTuple):
    """The ids that stand between documents; None where the tokenizer has none."""

    bos: int | None
    eos: int | None


def beginnings(tokens: NDArray[np.int64], borders: Borders) -> NDArray[np.bool_]:
    """Which of the tokens (rows, n) begin a document; the first of a row, cut as it may be, always does."""
    bos, eos = borders
    if bos is None:
        begins = tokens == eos
    elif bos != eos:
        begins = tokens == bos
    else:  # one id for both: of two in a row, the second begins a document; alone it ends one, or begins a row
        begins = np.zeros(tokens.shape, bool)
        begins[:, 1:] = (tokens[:, 1:] == bos) & (tokens[:, :-1] == eos)
    begins[:, 0] = True
    return begins


def position_ids(tokens: NDArray[np.int64], borders: Borders) -> NDArray[np.int64]:
    """Each token's place in its document, from 0: (rows, n) like the tokens."""
    places = np.arange(tokens.shape[1])
    starts = np.maximum.accumulate(np.where(beginnings(tokens, borders), places, 0), axis=1)
    found: NDArray[np.int64] = places - starts
    return found


def crossing(tokens: NDArray[np.int64], borders: Borders) -> NDArray[np.bool_]:
    """Which targets (rows, n - 1) are a BOS right after an EOS: the end of one document says nothing of the next.

    Where only one of the two ids exists nothing crosses: it is both the end that a model learns to give and the
    beginning that it starts from.
    """
    if borders.bos is None or borders.eos is None:
        return np.zeros((tokens.shape[0], tokens.shape[1] - 1), bool)
    return (tokens[:, :-1] == borders.eos) & (tokens[:, 1:] == borders.bos)
