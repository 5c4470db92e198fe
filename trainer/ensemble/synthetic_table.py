"""From parts to a token table with its statistics: in the order of the streams, described, verified, and named."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import data
from trainer.data.make import FORMAT, copy_tokenizer
from trainer.data.pack import write_rows
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest
from trainer.ensemble import recipe, text_statistics
from trainer.ensemble.parts import ordered, parts_of
from trainer.ensemble.recipe import Recipe
from trainer.files import digest, fsync_folder, read_json, write_json
from trainer.outcome import Outcome, RunError

MEASURED_TOKENS = 1 << 22
"""First so many tokens that statistics are taken of: shares of distinct n-grams depend on the size of the text."""
BLOCK = 1024
"""Rows that are read at once."""


def assemble(folder: Path, made: Recipe, opened: data.Data, tokenizer: Path) -> None:
    """Put the parts together in the order of the streams, describe them, and give the table its name."""
    work = recipe.partial(folder)
    if not (work / "table.json").exists():
        _write_table(work, made, opened, tokenizer)
    data.verify(work)
    for path in [*work.glob("part-*"), *work.glob(".part-*")]:
        path.unlink(missing_ok=True)
    try:
        os.rename(work, folder)
    except OSError as error:
        raise RunError(
            f"the table cannot be given its name: {error.strerror}", where=str(folder), mend="remove what is there",
            outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip
    # Last: whenever one looks, there is a recipe in one place or the other.
    (folder / recipe.FILE).unlink(missing_ok=True)
    fsync_folder(folder.parent)


def _write_table(work: Path, made: Recipe, opened: data.Data, source: Path) -> None:
    if not (work / "tokenizer").exists():
        copy_tokenizer(source, work)
    tokenizer = load_tokenizer(work / "tokenizer")
    if len(tokenizer) != made.vocab_size:
        raise RunError(
            f"the run's tokenizer has {len(tokenizer)} tokens, and the teacher {made.vocab_size}",
            where=str(source), mend="restore the tokenizer of the run",
        )  # fmt: skip
    bos, eos = opened.tokenizer["bos"], opened.tokenizer["eos"]
    sizes = sizes_of(tokenizer)
    split = write_rows(
        ((rows, sizes(rows)) for rows in _rows(work, made)),
        work / "train.arrow",
        made.sequence_length + 1,
        made.vocab_size,
    )
    histogram = split.pop("histogram")
    records = [read_json(work / f"{part.name}.json") for part in parts_of(made)]
    figures = np.concatenate(
        list(ordered(work, made, lambda part: np.array(read_json(work / f"{part.name}.json")["figures"])))
    )
    measured = _measured(work, made)
    found = text_statistics.summary(measured, bos, eos)
    texts = [measured, *(_some(held) for held in opened.validation.values())]
    copies = text_statistics.copied(texts, _training(opened))
    statistics = {
        "sequences": made.sequences,
        "tokens": made.tokens,
        "measured_tokens": measured[:, 1:].size,
        **found,
        "end_of_text_rate": float(histogram[eos] / histogram.sum()) if eos is not None else None,
        f"copied_{text_statistics.COPY}": copies[0],
        f"copied_{text_statistics.COPY}_of_validation": dict(zip(opened.validation, copies[1:], strict=True)),
        **likelihood(figures),
    }
    write_json(
        work / "table.json",
        {
            "format": FORMAT,
            "key": made.key,
            "path": None,
            "python": platform.python_version(),
            "corpus_digest": digest([record["sha256"] for record in records]),
            "tokenizer_digest": tokenizer_digest(work / "tokenizer"),
            "vocab_size": made.vocab_size,
            "bos": bos,
            "eos": eos,
            "sequence_length": made.sequence_length,
            "splits": {
                "train": split | {"dropped_tokens": 0, "documents": int(histogram[eos]) if eos is not None else None}
            },
            "unigram_bits_per_byte": None,
            "synthetic": {"recipe": asdict(made), "key": made.key, "statistics": statistics},
        },
    )


def likelihood(figures: NDArray[np.float64]) -> dict[str, float]:
    """Loss and entropy per sampled token with their standard errors over streams, from (streams, 3)."""
    tokens = figures[:, 2].sum()
    found = {}
    for name, column in (("teacher_loss", 0), ("teacher_entropy", 1)):
        mean = float(figures[:, column].sum() / tokens)
        rest = figures[:, column] - mean * figures[:, 2]
        found |= {name: mean, f"{name}_error": float(np.sqrt((rest**2).sum()) / tokens)}
    return found


def _rows(work: Path, made: Recipe) -> Iterator[NDArray[np.int64]]:
    for rows in ordered(work, made, lambda part: np.load(work / f"{part.name}.npy", mmap_mode="r", allow_pickle=False)):
        yield rows.astype(np.int64)


def _measured(work: Path, made: Recipe) -> NDArray[np.int64]:
    """The first rows of the table, as many as statistics are taken of."""
    wanted, found = max(1, MEASURED_TOKENS // made.sequence_length), []
    for rows in _rows(work, made):
        found.append(rows[: max(0, wanted - sum(map(len, found)))])
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)


def _some(split: Any) -> NDArray[np.int64]:
    count = min(split.sequences, BLOCK)
    rows: NDArray[np.int64] = split.rows(np.arange(count))[0]
    return rows


def _training(opened: data.Data) -> Iterator[NDArray[np.int64]]:
    """The rows that the teacher was trained on."""
    for source in opened.train.sources:
        for first in range(0, source.sequences, BLOCK):
            yield source.rows(np.arange(first, min(first + BLOCK, source.sequences)))[0]


def sizes_of(tokenizer: Any) -> Any:
    """A function from rows of tokens (n, L + 1) to bytes of text behind their targets (n,).

    A token of a byte-level tokenizer stands for a fixed number of bytes, also where a row ends inside a character; rows of any other are decoded.
    """
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):

        def decoded(rows: NDArray[np.int64]) -> NDArray[np.int64]:
            texts = tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return np.array([len(text.encode()) for text in texts], np.int64)

        return decoded
    sizes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))], np.int64)
    sizes[tokenizer.all_special_ids] = 0
    return lambda rows: sizes[rows[:, 1:]].sum(1)
