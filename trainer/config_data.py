"""The `data` section of a configuration: sources, mixture, tokenizer. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import lcm
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from trainer.outcome import RunError
from trainer.registry import STRICT
from trainer.units import Count, Share, split_length
from trainer.yaml_source import Source, nearest

SINGLE = "data"
"""The name of the only source of a run without a mixture."""
FINEST = 1_000_000
"""Largest common denominator of the weights: the schedule of a mixture repeats after so many sequences."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into tokens."""

    __pydantic_config__ = STRICT
    path: str | None = None
    """Folder of any `transformers` tokenizer; none trains a byte-level BPE on the training documents of all sources."""
    vocab_size: Annotated[Count, Field(ge=258)] = 32768
    """Size of the vocabulary of the trained BPE; of no effect on a given tokenizer."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Text of one kind, and how it becomes documents. Descriptions stand in the types: sections inherit these keys."""

    __pydantic_config__ = STRICT
    path: Annotated[
        str | list[str] | None,
        Field(description="File, folder, glob (or a list) of text, JSON lines (plain, gzip, zstd), Parquet, Arrow; "
              "`hub:OWNER/NAME`; `stdlib`, the embedded corpus: Python's own library source."),
    ] = None  # fmt: skip
    table: Annotated[str | None, Field(description="A prepared token table, used as it is instead of `path`.")] = None
    documents: Annotated[
        Literal["file", "paragraph", "line"],
        Field(description="What a document is in a text file: the file, a paragraph (between blank lines) or a line."),
    ] = "file"
    text_key: Annotated[
        str, Field(description="The key of the text in a JSON line; its column in Parquet, Arrow and on the hub.")
    ] = "text"
    validation_path: Annotated[
        str | list[str] | None,
        Field(description="Validation text; none holds back `validation_fraction` of the documents."),
    ] = None
    validation_fraction: Annotated[
        float,
        Field(gt=0, lt=1, description="Share of the documents held back for validation, chosen by a hash of the text."),
    ] = 0.02
    test_path: Annotated[
        str | list[str] | None,
        Field(description="Text of the test split, which only `orthogon evaluate --split test` reads."),
    ] = None
    test_fraction: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(
            description="Share of the documents held back for the test split, by the same hash; none makes no such split."
        ),
    ] = None
    subset_tokens: Annotated[
        Annotated[Count, Field(gt=0)] | None,
        Field(description="Train on exactly so many tokens, in whole sequences; a larger subset holds every smaller one "
              "of the same seed. None takes all."),
    ] = None  # fmt: skip
    subset_seed: Annotated[
        int, Field(description="Seed of which sequences the subset holds, apart from the seed of their order.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class MixtureSource(SourceConfig):
    """One source of a mixture."""

    weight: Share
    """Share of the run's sequences, such as `0.3` or `1/3`; the weights of a mixture sum to 1. At 0 the source is validated on only."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Text, and how it becomes sequences of tokens."""

    mixture: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], MixtureSource] = field(default_factory=dict)
    """Several sources by name, each with its own path or table and a weight, instead of `path` and `table`."""
    folder: str = "prepared"
    """Where token tables are made and found again."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    sequence_length: Annotated[Count, Field(ge=2)] = 1024
    """Tokens that a sequence predicts."""
    document_masking: bool = False
    """Let no token attend to another document; refused where the architecture cannot keep it (tested at the start)."""
    order_seed: int = 0
    """Seed of the order of the sequences, apart from the seed of the weights."""
    epoch_order: Literal["reshuffle", "repeat"] = "reshuffle"
    """Whether each pass over a source has an order of its own or all have that of the first."""
    max_epochs: Annotated[int, Field(gt=0)] | None = None
    """Most passes over any source; a run that needs more ends with the outcome `out of data`. None: as many as it needs."""


class HubName(NamedTuple):
    """A dataset on the Hugging Face hub, or a local folder that is laid out like one."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def local(self) -> bool:
        return self.name[:1] in "./~"

    def __str__(self) -> str:
        options = [f"{key}={getattr(self, key)}" for key in ("config", "split", "revision") if getattr(self, key)]
        return ",".join([f"hub:{self.name}", *options])


def parse_hub(text: str) -> HubName | None:
    """`hub:OWNER/NAME[,config=...][,split=...][,revision=...]`, `hub:./FOLDER`; None for another kind of path.

    Raises:
        RunError: no name, or an unknown or empty option.
    """
    if not text.startswith("hub:"):
        return None
    name, *options = text.removeprefix("hub:").split(",")
    known = HubName._fields[1:]
    if not re.fullmatch(r"[./~].*|[\w.-]+(/[\w.-]+)?", name):
        raise RunError(
            f"'{text}' names no dataset",
            where="data.path",
            mend="write hub:OWNER/NAME, or hub:./FOLDER for a copy of one",
        )
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known or not value:
            guess = nearest(key, list(known))
            mend = f"did you mean {guess}=...?" if guess else f"options: {', '.join(f'{k}=...' for k in known)}"
            raise RunError(f"'{option}' in '{text}' is no option of a hub name", where="data.path", mend=mend)
        given[key] = value
    return HubName(name, **given)


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources by name, in the order of the names; the only one of a run without a mixture is called `data`."""
    return dict(sorted(data.mixture.items())) if data.mixture else {SINGLE: data}


def weights_of(data: DataConfig) -> dict[str, Fraction]:
    """The exact share of each source, in the order of the names; they sum to 1."""
    if not data.mixture:
        return {SINGLE: Fraction(1)}
    return {name: Fraction(str(source.weight).replace(" ", "")) for name, source in sorted(data.mixture.items())}


def check_data(data: DataConfig, length: str, source: Source) -> None:
    """What no single field of the section can know.

    Raises:
        RunError: a source without text or with two, weights that do not sum to 1 or are too fine, a key that would do
            nothing, a hub name that is none, a length in epochs of an unknown source.
    """
    sections: dict[str, SourceConfig] = {f"data.mixture.{name}": one for name, one in data.mixture.items()}
    sections = sections or {"data": data}
    if data.mixture:
        _check_keys(data, source)
    for section, one in sections.items():
        if (one.path is None) == (one.table is None):
            also = " or data.mixture" if section == "data" else ""
            raise RunError(
                f"{section} needs one of {section}.path and {section}.table{also}",
                where=source.where(section),
                mend="give path (text; `stdlib` is the embedded corpus) or table (a prepared table)",
            )
        for key in ("path", "validation_path"):
            value = getattr(one, key) or []
            for entry in [value] if isinstance(value, str) else value:
                try:
                    parse_hub(entry)
                except RunError as error:
                    raise RunError(error.what, where=source.where(f"{section}.{key}"), mend=error.mend) from None
    if data.mixture:
        _check_mixture(data, source)
    for name, weight in weights_of(data).items():
        if weight == 0 and data.mixture[name].subset_tokens is not None:
            raise RunError(
                f"data.mixture.{name}.subset_tokens does nothing at weight 0: no sequence of {name} is trained on",
                where=source.where(f"data.mixture.{name}"),
                mend="leave it out, or give the source a weight",
            )
    unit = split_length(length)[1]
    if unit.startswith("epochs"):
        of = unit.removeprefix("epochs").removeprefix(" of ") or None
        if data.mixture and not weights_of(data).get(of or "", 0):
            raise RunError(
                f"train.length is '{length}', and the sources of a mixture end at different steps",
                where=source.where("train.length"),
                mend=f"give steps or tokens, or say of which source, such as '{length.split()[0]} epochs of {next(name for name in data.mixture if weights_of(data)[name])}'",
            )
        if not data.mixture and of is not None:
            raise RunError(
                f"train.length is '{length}', and there is no mixture",
                where=source.where("train.length"),
                mend=f"write '{length.split()[0]} epochs'",
            )


def _check_keys(data: DataConfig, source: Source) -> None:
    for key in (f.name for f in fields(SourceConfig)):
        default = SourceConfig.__dataclass_fields__[key].default
        if getattr(data, key) != default:
            raise RunError(
                f"data.{key} does nothing beside data.mixture",
                where=source.where(f"data.{key}"),
                mend=f"give it to a source: data.mixture.{next(iter(data.mixture))}.{key}",
            )


def _check_mixture(data: DataConfig, source: Source) -> None:
    weights = weights_of(data)
    total = sum(weights.values())
    if total != 1:
        raise RunError(
            f"the weights of data.mixture sum to {float(total):.12g} and not to 1",
            where=source.where("data.mixture"),
            mend="correct the weights: " + ", ".join(f"{n} {data.mixture[n].weight}" for n in weights)
            + " (a third is written 1/3)",
        )  # fmt: skip
    period = lcm(*(weight.denominator for weight in weights.values()))
    if period > FINEST:
        raise RunError(
            f"the weights of data.mixture are too fine: their common denominator is {period:,}, above {FINEST:,}",
            where=source.where("data.mixture"),
            mend="round them to six decimals that sum to 1, or give fractions",
        )
    if data.tokenizer.path is None and len({one.table is None for one in data.mixture.values()}) == 2:
        table = next(one.table for one in data.mixture.values() if one.table is not None)
        raise RunError(
            "a mixture of prepared tables and of text needs the tokenizer of the tables",
            where=source.where("data.mixture"),
            mend=f"set data.tokenizer.path, for example to {table}/tokenizer",
        )
