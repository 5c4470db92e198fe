"""A prepared token table: fixed-length rows on disk, memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.data.tokenizer import given_digest, tokenizer_digest
from trainer.files import read_json, sha256_file
from trainer.outcome import RunError


class Rows(Protocol):
    """Rows of tokens by their ids: a split of a table, or a choice of its rows."""

    @property
    def sequences(self) -> int: ...

    def rows(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

    def bytes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Split:
    """One split: `sequences` rows of sequence_length + 1 tokens; neighbours overlap by one."""

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        dataset = Dataset.from_file(str(path))
        self._rows = dataset.with_format("numpy")
        self._sizes = dataset.select_columns(["bytes"]).with_format("numpy")
        self.sequences: int = dataset.num_rows

    def rows(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(tokens (n, L + 1), bytes of text behind each row's targets (n,)), both int64."""
        found = self._rows[self._within(ids)]
        return np.asarray(found["tokens"]).astype(np.int64), np.asarray(found["bytes"]).astype(np.int64)

    def bytes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of text behind each row's targets (n,), without reading the tokens."""
        return np.asarray(self._sizes[self._within(ids)]["bytes"]).astype(np.int64)

    def _within(self, ids: NDArray[np.int64]) -> list[int]:
        if len(ids) and ids.max() >= self.sequences:
            raise ValueError(f"sequence {ids.max()} is beyond the split's {self.sequences}")
        found: list[int] = ids.tolist()
        return found


@dataclass(frozen=True)
class Table:
    """A token table and its facts (`table.json`)."""

    folder: Path
    facts: dict[str, Any]
    train: Split
    validation: Split | None = None
    """None of a table that is for training only: synthetic text."""
    test: Split | None = None


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts of a table.

    Raises:
        RunError: there is no finished table.
    """
    try:
        facts: dict[str, Any] = read_json(folder / "table.json")
    except (OSError, ValueError):
        raise RunError(
            f"there is no token table in {folder}",
            where="data.table",
            mend="make one with `orthogon data prepare CONFIG`",
        ) from None
    return facts


def verify(folder: Path) -> None:
    """Check size and SHA-256 of the table's files.

    Raises:
        RunError: names file, expected, found.
    """
    for split in facts_of(folder)["splits"].values():
        path = folder / split["file"]
        size = path.stat().st_size if path.exists() else None
        found = sha256_file(path) if size == split["size"] else f"{size} bytes"
        if found != split["sha256"]:
            raise RunError(
                f"the token table is damaged: {split['file']} should have {split['size']} bytes, sha256 "
                f"{split['sha256'][:16]}, and has {found[:16]}",
                where=str(path),
                mend="remove the folder and prepare it again",
            )


def open_table(folder: Path, config: DataConfig) -> Table:
    """Open a table for a run.

    Raises:
        RunError: the table was made for another sequence length or tokenizer than the configuration says, or holds ids
            beyond its vocabulary.
    """
    facts = facts_of(folder)
    if facts["sequence_length"] != config.sequence_length:
        raise RunError(
            f"the table's sequences have {facts['sequence_length']} tokens, the run wants {config.sequence_length}",
            where=f"data.sequence_length, {folder}",
            mend="set data.sequence_length, or prepare another table",
        )
    if config.tokenizer.path is not None:
        wanted = given_digest(config.tokenizer.path)
        # The table's own copy counts too: it may have another form than the folder that was given.
        if wanted != facts["tokenizer_digest"] and wanted != tokenizer_digest(folder / "tokenizer"):
            raise RunError(
                f"the table was made with another tokenizer ({facts['tokenizer_digest'][:12]}) than "
                f"{config.tokenizer.path} ({wanted[:12]})",
                where=f"data.tokenizer.path, {folder}",
                mend="give the table's tokenizer, or prepare another table",
            )
    for name, split in facts["splits"].items():
        path = folder / split["file"]
        size = path.stat().st_size if path.exists() else None
        if size != split["size"]:
            raise RunError(
                f"the token table is damaged: {split['file']} should have {split['size']} bytes and has {size}",
                where=str(path),
                mend="remove the folder and prepare it again",
            )
        if split["max_token"] >= facts["vocab_size"]:
            raise RunError(
                f"the {name} split holds token {split['max_token']}, beyond the vocabulary of {facts['vocab_size']}",
                where=str(folder),
                mend="prepare the table again with the right tokenizer",
            )
    splits = {name: Split(folder / split["file"]) for name, split in facts["splits"].items()}
    return Table(folder, facts, **splits)
