"""A folder of a teacher's targets for one stream of data, found by row: independent of batch, order, epoch and ranks.

    plan.json        what is made: form, teacher, stream, rows in all and in a part
    heads.safetensors   of the members
    part-00000.bin   offsets of its records (rows + 1, uint64), then one record per row
    cache.json       the plan, and size and SHA-256 of every file; written last

A row is a sequence of the packed data: its number in its source, after all rows of the sources before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from trainer import distributed
from trainer.config import RunConfig
from trainer.data import Data
from trainer.ensemble import forms, manifest
from trainer.ensemble.targets import Dense, Heads, Sparse
from trainer.files import digest, read_json, sha256_file
from trainer.outcome import RunError

FORMAT = 1
FILE, PLAN, HEADS = "cache.json", "plan.json", "heads.safetensors"


def stream_of(data: Data, config: RunConfig) -> dict[str, Any]:
    """What targets belong to: tables, subsets, tokenizer, and what else decides what a teacher sees before a token."""
    identity = data.identity()
    return {
        "tokenizer": identity["tokenizer"],
        "sequence length": config.data.sequence_length,
        "document masking": config.data.document_masking,
        "sources": identity["sources"],
    }


def teacher_of(ensemble: manifest.Ensemble) -> dict[str, Any]:
    """What answers are a teacher's: its rule, its checkpoints, its vocabulary."""
    return {
        "name": ensemble.name,
        "rule": ensemble.rule,
        "members": {member.run: member.manifest_sha256 for member in ensemble.members},
        "vocabulary": ensemble.vocab_size,
    }


def part_name(number: int) -> str:
    return f"part-{number:05d}.bin"


@dataclass
class Cache:
    """An opened cache."""

    folder: Path
    facts: dict[str, Any]
    form: forms.Form
    heads: Heads
    digest: str
    _parts: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """For people."""
        return f"{self.form.name}, {self.facts['bytes_per_token']:.1f} bytes per token"

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature that the targets do not hold.

        Raises:
            RunError: they hold temperature 1 alone.
        """
        if temperature != 1 and not isinstance(self.form, forms.Hidden):
            raise RunError(
                f"a cache of {self.form.name} targets holds the distributions of temperature 1, not of {temperature:g}",
                where="distill.temperature",
                mend="leave temperature out, or use a cache of hidden states",
            )

    def records(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The bytes of these rows: two reads each, wherever they are."""
        per_part, found = self.facts["rows_per_part"], []
        for row in rows.tolist():
            number, place = divmod(row, per_part)
            if number not in self._parts:
                self._parts[number] = np.memmap(self.folder / part_name(number), np.uint8, "r")
            part = self._parts[number]
            begin, end = part[8 * place : 8 * place + 16].view(np.uint64).tolist()
            found.append(part[begin:end])
        return found

    def read(
        self, stream: Any, places: NDArray[np.int64], device: torch.device, precision: torch.dtype
    ) -> Dense | Sparse:
        """Targets of the sequences at these positions of the stream, end to end."""
        length = self.facts["stream"]["sequence length"]
        if self.heads.matrix.dtype != precision or self.heads.matrix.device != device:
            biases = None if self.heads.biases is None else self.heads.biases.to(device)
            matrix = self.heads.matrix.to(device, precision)
            self.heads = Heads(matrix, biases, self.heads.members, self.heads.vocabulary, self.heads.probability_mean)
        found = self.form.decode(self.records(rows_of(stream, places)), length, self.heads)
        if isinstance(found, Dense):
            return Dense(found.states.to(device, precision), self.heads)
        return Sparse(found.ids.to(device), found.probabilities.to(device).float(), found.rest.to(device).float())


def rows_of(stream: Any, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a cache that belong to positions of the stream."""
    sources, ids = stream.ids(places)
    before = np.cumsum([0, *(source.sequences for source in stream.sources)])
    rows: NDArray[np.int64] = before[sources] + ids
    return rows


def opened(folder: Path, stream: dict[str, Any], ensemble: manifest.Ensemble) -> Cache:
    """A finished cache, every file of it verified, each rank its share. Collective.

    Raises:
        RunError: on all ranks alike: there is none, it is damaged, or it was made for other data or of another teacher.
    """
    facts = distributed.on_rank_zero(lambda: _facts(folder, stream, ensemble))
    files = sorted(facts["files"])[distributed.rank() :: distributed.world()]
    distributed.together(lambda: [_check_file(folder, facts, file) for file in files])
    return Cache(folder, facts, forms.of_json(facts["form"]), _heads(folder, facts), digest(facts))


def check_plan(folder: Path, facts: dict[str, Any], stream: dict[str, Any], ensemble: manifest.Ensemble) -> None:
    """The cache belongs to this stream and this teacher.

    Raises:
        RunError: it does not; says in what they differ.
    """
    theirs, teacher = facts["stream"], teacher_of(ensemble)
    what = ""
    for key in ("tokenizer", "sequence length", "document masking"):
        if theirs[key] != stream[key]:
            what = what or f"another {key} ({_short(theirs[key])}) than the run's ({_short(stream[key])})"
    for name in theirs["sources"].keys() | stream["sources"].keys():
        one, other = theirs["sources"].get(name), stream["sources"].get(name)
        if one != other:
            what = what or (
                f"other training tokens of {name}"
                if one is None or other is None or one["train_sha256"] != other["train_sha256"]
                else f"another subset of {name}"
            )
    if what:
        raise RunError(
            f"the cache was made for {what}",
            where=f"distill.cache, {folder}",
            mend="make a cache for this data: orthogon distill cache",
        )
    for key in ("rule", "members", "vocabulary"):
        if facts["teacher"][key] != teacher[key]:
            raise RunError(
                f"the cache holds the answers of another teacher: its {key} are not those of {ensemble.name}",
                where=f"distill.cache, {folder}",
                mend="name that teacher, or make a cache of this one: orthogon distill cache",
            )


def _facts(folder: Path, stream: dict[str, Any], ensemble: manifest.Ensemble) -> dict[str, Any]:
    if not (folder / FILE).exists():
        begun = (folder / PLAN).exists()
        raise RunError(
            f"the cache in {folder} is not finished" if begun else f"there is no cache in {folder}",
            where="distill.cache",
            mend="the same `orthogon distill cache` goes on" if begun else "make one: orthogon distill cache",
        )
    try:
        record = read_json(folder / FILE)
        facts: dict[str, Any] = record["cache"]
        good = digest(facts) == record["sha256"] and facts["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise _damaged(folder, FILE, "not what was written")
    check_plan(folder, facts, stream, ensemble)
    return facts


def _check_file(folder: Path, facts: dict[str, Any], file: str) -> None:
    expected, path = facts["files"][file], folder / file
    if not path.is_file() or path.stat().st_size != expected["size"]:
        raise _damaged(folder, file, f"missing, or not of {expected['size']} bytes")
    if sha256_file(path) != expected["sha256"]:
        raise _damaged(folder, file, f"its sha256 is not {expected['sha256'][:16]}")


def _damaged(folder: Path, file: str, how: str) -> RunError:
    return RunError(
        f"the cache is damaged: {file}: {how}",
        where=str(folder / file),
        mend="remove the folder and make it again: orthogon distill cache",
    )


def _heads(folder: Path, facts: dict[str, Any]) -> Heads:
    """The members' heads; for sparse targets, which need none, only how many tokens there are."""
    teacher = facts["teacher"]
    tensors = load_file(folder / HEADS) if HEADS in facts["files"] else {"matrix": torch.empty(0, 0)}
    mean = teacher["rule"] == manifest.RULES[1]
    return Heads(tensors["matrix"], tensors.get("biases"), len(teacher["members"]), teacher["vocabulary"], mean)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def plan_of(
    form: forms.Form, ensemble: manifest.Ensemble, stream: dict[str, Any], precision: str, rows: int, rows_per_part: int
) -> dict[str, Any]:
    """What a cache is, before any of it is made."""
    return {
        "format": FORMAT,
        "form": forms.to_json(form),
        "teacher": teacher_of(ensemble),
        "stream": stream,
        "precision": precision,
        "rows": rows,
        "rows_per_part": rows_per_part,
    }
