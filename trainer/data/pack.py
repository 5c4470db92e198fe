"""Documents to tokens with the bytes that each stands for, and tokens to rows of fixed length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.files import fsync_file, sha256_file

SLICE = 1 << 20  # characters per call of the tokenizer, about
PIECE = 1 << 20  # characters of a longer document that are encoded at once, about
# The end of a line between two characters that are no white space: no token of a byte-level BPE reaches across it.
_SEAM = re.compile(r"\S\n(?=\S)")


def encode(tokenizer: Any, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens of the documents, each between BOS and EOS (where the tokenizer has them), and bytes of text per token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    sizes: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    before = np.array([bos] if bos is not None else [], np.int32)
    after = np.array([eos] if eos is not None else [], np.int32)
    backend = tokenizer.backend_tokenizer
    # What a tokenizer's file may ask for, and a corpus must not get: markers out of the text, cuts, padding.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for batch in _batches(texts):
        encodings = backend.encode_batch([text for text, _, _ in batch], add_special_tokens=False)
        for (text, first, last), encoding in zip(batch, encodings, strict=True):
            borders = before if first else before[:0], after if last else after[:0]
            tokens += [borders[0], np.array(encoding.ids, np.int32), borders[1]]
            sizes += [np.zeros_like(borders[0]), bytes_per_token(text, encoding.offsets), np.zeros_like(borders[1])]
    return np.concatenate(tokens), np.concatenate(sizes)


def pieces(text: str) -> Iterator[str]:
    """A long document in pieces, so that the tokenizer's memory does not grow with it; cut where no token reaches across."""
    start = 0
    while len(text) - start > 2 * PIECE:
        seam = _SEAM.search(text, start + PIECE, start + 2 * PIECE)
        end = seam.end() if seam else start + 2 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(texts: list[str]) -> Iterator[list[tuple[str, bool, bool]]]:
    """The texts' pieces, (piece, first of its text, last of its text), about `SLICE` characters at a time."""
    batch: list[tuple[str, bool, bool]] = []
    size = 0
    for text in texts:
        start = 0
        for piece in pieces(text):
            batch.append((piece, start == 0, start + len(piece) == len(text)))
            start, size = start + len(piece), size + len(piece)
            if size >= SLICE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def bytes_per_token(text: str, offsets: list[tuple[int, int]]) -> NDArray[np.int32]:
    """UTF-8 bytes from the end of the token before to the end of each token; they add up to the bytes of the text."""
    if not offsets:
        return np.empty(0, np.int32)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    ends[-1] = len(text)
    if not text.isascii():
        widths = np.fromiter((len(character.encode()) for character in text), np.int64, len(text))
        ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    return np.diff(ends, prepend=0).astype(np.int32)


def pack(parts: list[Path], split: str, target: Path, width: int, vocab_size: int) -> dict[str, Any]:
    """Write the rows of a split as an Arrow file and return its facts.

    Rows of `width` tokens overlap by one, so that every token but the first is predicted once; the rest at the end that
    fills no row is dropped and counted.
    """
    rest = 0

    def blocks() -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        nonlocal rest
        for tokens, sizes, left in _rows(parts, split, width):
            rest = left
            yield tokens, sizes

    facts = write_rows(blocks(), target, width, vocab_size)
    return facts | {"dropped_tokens": rest}


def write_rows(
    blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]], target: Path, width: int, vocab_size: int
) -> dict[str, Any]:
    """Write blocks of (rows (n, width), bytes of text behind the targets of each (n,)) as an Arrow file.

    Returns:
        The facts of the split, and a `histogram` of its targets.
    """
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    kind = "uint16" if vocab_size <= 1 << 16 else "int32"
    features = Features({"tokens": Sequence(Value(kind), length=width), "bytes": Value("int32")})
    facts: dict[str, Any] = {"sequences": 0, "tokens": 0, "bytes": 0, "max_token": 0, "file": target.name}
    histogram = np.zeros(vocab_size, np.int64)
    target.unlink(missing_ok=True)
    writer = ArrowWriter(path=str(target), features=features)
    for tokens, sizes in blocks:
        if len(tokens) == 0:
            continue
        writer.write_batch({"tokens": tokens.astype(kind), "bytes": sizes})
        facts["sequences"] += len(tokens)
        facts["tokens"] += tokens[:, 1:].size
        facts["bytes"] += int(sizes.sum())
        facts["max_token"] = max(facts["max_token"], int(tokens.max()))
        histogram += np.bincount(tokens[:, 1:].ravel(), minlength=vocab_size)[:vocab_size]
    if facts["sequences"]:
        writer.finalize()
        fsync_file(target)
        facts |= {"size": target.stat().st_size, "sha256": sha256_file(target)}
    else:
        writer.close()
    return facts | {"histogram": histogram}


def _rows(parts: list[Path], split: str, width: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], int]]:
    """Blocks of (rows, bytes per row, tokens left over so far)."""
    tokens, sizes = np.empty(0, np.int32), np.empty(0, np.int32)
    step = width - 1
    for part in parts:
        with np.load(part, allow_pickle=False) as arrays:
            tokens = np.concatenate([tokens, arrays[f"{split}_tokens"]])
            sizes = np.concatenate([sizes, arrays[f"{split}_bytes"]])
        count = max(0, (len(tokens) - 1) // step)
        used = count * step
        rows = (
            np.lib.stride_tricks.sliding_window_view(tokens, width)[:used:step]
            if count
            else np.empty((0, width), np.int32)
        )
        per_row = sizes[1 : used + 1].reshape(count, step).sum(axis=1, dtype=np.int32)
        left = len(tokens) - used
        yield rows.copy(), per_row, max(0, left - 1)
        tokens, sizes = tokens[used:], sizes[used:]
