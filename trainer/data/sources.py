"""The opened sources of a run: their tables, one stream over them, and what holds for all of them together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainer.config import DataConfig, SourceConfig
from trainer.config_data import sources_of, weights_of
from trainer.data.stream import Part, Stream, Subset
from trainer.data.table import Rows, Split, Table, open_table
from trainer.outcome import RunError


@dataclass(frozen=True)
class Data:
    """What a run trains on and validates on. Dictionaries have the sources' names, in their order, as keys."""

    tables: dict[str, Table]
    weights: dict[str, Fraction]
    """Exact shares of the training sequences."""
    train: Stream
    validation: dict[str, Split]
    subsets: dict[str, tuple[int, int]]
    """(sequences, seed) of the sources of which the run takes a subset."""

    @property
    def tokenizer(self) -> dict[str, Any]:
        """`tokenizer_digest`, `vocab_size`, `bos` and `eos`, the same for all tables."""
        facts = next(iter(self.tables.values())).facts
        return {key: facts[key] for key in ("tokenizer_digest", "vocab_size", "bos", "eos")}

    @property
    def synthetic(self) -> list[str]:
        """The sources whose text a model made up."""
        return [name for name, table in self.tables.items() if "synthetic" in table.facts]

    @property
    def measured(self) -> dict[str, Fraction]:
        """Shares of the sources that have text to measure on: synthetic text has none, and the others share its weight;
        those of weight 0 count where there are no others, one as much as another."""
        weights = {name: self.weights[name] for name in self.validation}
        whole = sum(weights.values())
        return {name: weight / whole if whole else Fraction(1, len(weights)) for name, weight in weights.items()}

    @property
    def unigram_bits_per_byte(self) -> float:
        """Entropy of the validation tokens, each source under its own unigram distribution, mixed as the sources are."""
        facts = {name: self.tables[name].facts for name in self.validation}
        values = {name: one["unigram_bits_per_byte"] for name, one in facts.items()}
        splits = {name: one["splits"]["validation"] for name, one in facts.items()}
        density = {name: split["bytes"] / max(split["tokens"], 1) for name, split in splits.items()}
        bits = sum(float(w) * values[name] * density[name] for name, w in self.measured.items())
        return bits / sum(float(w) * density[name] for name, w in self.measured.items())

    def tested(self) -> Data:
        """The same with the test split in place of validation.

        Raises:
            RunError: a table without one.
        """
        splits = {}
        for name in self.validation:
            table = self.tables[name]
            if table.test is None:
                raise RunError(
                    f"the table of {name} has no test split",
                    where=str(table.folder),
                    mend="set data.test_path or data.test_fraction before training: what is trained on is no test",
                )
            splits[name] = table.test
        return replace(self, validation=splits)

    def identity(self) -> dict[str, Any]:
        """What makes a stream of data the same stream."""
        sources = {}
        for name, table in self.tables.items():
            train = table.facts["splits"]["train"]
            sources[name] = {"train_sha256": train["sha256"], "sequences": train["sequences"]}
            if name in self.subsets:
                sources[name] |= dict(zip(("subset", "subset_seed"), self.subsets[name], strict=True))
        return {"tokenizer": self.tokenizer["tokenizer_digest"], "sources": sources}


def open_data(folders: dict[str, Path], config: DataConfig) -> Data:
    """Open the tables of all sources for a run.

    Raises:
        RunError: a table that does not fit the configuration, tables of several tokenizers, a subset that is no whole
            number of sequences or larger than its table.
    """
    sources, weights = sources_of(config), weights_of(config)
    tables = {name: open_table(folder, config) for name, folder in folders.items()}
    _check_one_tokenizer(tables)
    parts, subsets = {}, {}
    for name, table in tables.items():
        rows: Rows = table.train
        if sources[name].subset_tokens is not None:
            count = _subset(name, sources[name], table, config)
            rows, subsets[name] = (
                Subset(table.train, count, sources[name].subset_seed),
                (count, sources[name].subset_seed),
            )
        parts[name] = Part(rows, weights[name])
    validation = {name: table.validation for name, table in tables.items() if table.validation is not None}
    for name, table in tables.items():
        if not weights[name] and table.validation is None:
            raise RunError(
                f"{name} does nothing: its weight is 0, and synthetic text has no validation text",
                where=f"data.mixture.{name}",
                mend="give it a weight, or leave it out",
            )
    if not validation:
        raise RunError(
            "no source has validation text: synthetic text has none",
            where=", ".join(str(table.folder) for table in tables.values()),
            mend="mix it with real text in data.mixture",
        )
    return Data(
        tables=tables,
        weights=weights,
        train=Stream(parts, config.order_seed, config.epoch_order),
        validation=validation,
        subsets=subsets,
    )


def summary(data: Data) -> list[tuple[str, str]]:
    """Rows of a table for people: what each source holds and how much of it is taken."""
    lines = []
    rows = dict(zip(data.train.names, data.train.sources, strict=True))
    for name, table in data.tables.items():
        train, held_back = table.facts["splits"]["train"], table.facts["splits"].get("validation")
        taken = rows[name].sequences if name in rows else 0
        share = "validated on only" if name not in rows else f"{data.weights[name]} of the sequences"
        of = f" (a subset of {train['sequences']:,})" if name in data.subsets else ""
        lines.append(
            (
                name,
                f"{share + '; ' if len(data.tables) > 1 else ''}{taken:,} sequences{of} of {table.facts['sequence_length']} tokens, "
                f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes per token, "
                f"{held_back['sequences'] if held_back else 0:,} for validation, digest {train['sha256'][:12]}",
            )
        )
    return lines


def _subset(name: str, source: SourceConfig, table: Table, config: DataConfig) -> int:
    """Sequences of the subset that a source asks for."""
    assert source.subset_tokens is not None
    length, there = config.sequence_length, table.train.sequences
    key = f"data.mixture.{name}.subset_tokens" if config.mixture else "data.subset_tokens"
    count, rest = divmod(source.subset_tokens, length)
    if rest:
        raise RunError(
            f"{key} = {source.subset_tokens} is no whole number of sequences of {length} tokens",
            where=key,
            mend=f"use {count * length or ''}{' or ' if count else ''}{(count + 1) * length}",
        )
    if count > there:
        raise RunError(
            f"{key} = {source.subset_tokens} is more than the table's {there * length} tokens",
            where=f"{key}, {table.folder}",
            mend=f"use at most {there * length}, or give more text",
        )
    return count


def _check_one_tokenizer(tables: dict[str, Table]) -> None:
    (first, table), *others = tables.items()
    for name, other in others:
        for key in ("tokenizer_digest", "vocab_size", "bos", "eos"):
            if other.facts[key] != table.facts[key]:
                raise RunError(
                    f"the tables of {first} and {name} were made with different tokenizers ({key} {table.facts[key]} "
                    f"and {other.facts[key]})",
                    where=f"{table.folder}, {other.folder}",
                    mend="prepare them again with one data.tokenizer.path",
                )
