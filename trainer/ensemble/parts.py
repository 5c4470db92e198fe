"""The parts of a synthetic table: which batches each holds, whether it is there, and its rows in the order of the streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trainer.ensemble.recipe import JOINT, Recipe
from trainer.files import read_json, sha256_file

PART_TOKENS = 1 << 17
"""Tokens of a part, about: what a rank loses when it is killed."""


@dataclass(frozen=True)
class Part:
    """Some batches of one member."""

    member: int
    """Place among the models: 0 of the joint ensemble."""
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"part-{self.batches[0]:08d}"


def parts_of(made: Recipe) -> list[Part]:
    """All parts of a table. Batch b is of model b mod K."""
    models = 1 if made.mode == JOINT else len(made.members)
    batches = -(-made.sequences // made.batch)
    each = max(1, PART_TOKENS // (made.batch * made.sequence_length))
    own = [range(member, batches, models) for member in range(models)]
    return [
        Part(member, tuple(some[first : first + each]))
        for member, some in enumerate(own)
        for first in range(0, len(some), each)
    ]


def is_made(work: Path, part: Part, made: Recipe) -> bool:
    """Whether a part is there, of this recipe and with its digest."""
    try:
        record = read_json(work / f"{part.name}.json")
        same = record["key"] == made.key and record["batches"] == list(part.batches)
        return same and record["sha256"] == sha256_file(work / f"{part.name}.npy")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def ordered(work: Path, made: Recipe, read: Callable[[Part], NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """What `read` finds in the part of each batch, batch after batch, up to the last stream of the table."""
    at = {batch: (part, place) for part in parts_of(made) for place, batch in enumerate(part.batches)}
    kept: dict[int, tuple[str, Any]] = {}
    for batch in range(len(at)):
        part, place = at[batch]
        if kept.get(part.member, ("", None))[0] != part.name:
            kept[part.member] = (part.name, read(part))
        rows = kept[part.member][1][place * made.batch : (place + 1) * made.batch]
        yield rows[: made.sequences - batch * made.batch]
