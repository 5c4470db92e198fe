"""Students: runs that learn from what a teacher, an ensemble or a run, makes of text.

Synthetic text: a token table of the teacher's samples is mixed with the real text by a share of the stream. The real text is
seen as often as without it; the synthetic sequences come on top.
"""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import process
from launch.backends import torchrun
from trainer.ensemble import recipe as recipes
from trainer.ensemble.manifest import Ensemble
from trainer.ensemble.recipe import Recipe
from trainer.files import sha256_file
from trainer.outcome import RunError
from trainer.units import parse_share, split_length

if TYPE_CHECKING:
    from trainer.config import RunConfig

REAL, SYNTHETIC = "real", "synthetic"
"""Names of the sources of a student's mixture."""


def share_of(text: str) -> Fraction:
    """The synthetic share w of a student's stream, exactly.

    Raises:
        RunError: it is no share, or leaves no real text or no synthetic one.
    """
    try:
        share = Fraction(str(parse_share(text)).replace(" ", ""))
    except ValueError:
        share = Fraction(0)
    if not 0 < share < 1:
        raise RunError(
            f"--share is {text}: the synthetic share of the stream is above 0 and below 1, since the rest is real text",
            where="command line, --share",
            mend="give for example 0.5, 0.75 or 9/10",
        )
    return share


def sampled(folder: Path, recipe: Recipe, runs: Path, overrides: list[str]) -> dict[str, Any] | None:
    """Make a table of synthetic text in a process of its own, on the ranks that the members' configuration and `overrides`
    ask for; what was interrupted goes on.

    Returns:
        The table's statistics, or None where it was finished before.

    Raises:
        RunError: something else is there, or parts of another recipe; a failure of the ranks ends this process.
    """
    if recipes.finished(folder, recipe):
        return None
    _, config = process.opened(recipe.members[0].run, runs, overrides)
    if not recipes.begin(folder, recipe):  # another process has finished it while this one waited
        return None
    found: dict[str, Any] = torchrun.answer(config, "sample", str(folder), *overrides, f"--runs={runs}")
    return found


def table_of(runs: Path, recipe: Recipe) -> Path:
    """Where the table of a recipe lies that was given no folder."""
    return runs / "synthetic" / f"{recipe.teacher}-{recipe.mode}-{recipe.key[:12]}"


def check_teacher(config: RunConfig, teacher: Ensemble, runs: Path) -> None:
    """The student's real text is the teacher's: else what is held back from one may be what the other was trained on.

    Raises:
        RunError: it is other text, another subset, another sequence length or tokenizer.
    """
    from trainer import config as configuration
    from trainer.config_data import SourceConfig, sources_of

    theirs = configuration.parse(recipes.config_of(runs, teacher.members[0])).data
    mine, other = sources_of(config.data), sources_of(theirs)
    facts: list[tuple[str, Any, Any]] = [("the names of data.mixture", sorted(other), sorted(mine))]
    for key in ("sequence_length", "document_masking"):
        facts.append((f"data.{key}", getattr(theirs, key), getattr(config.data, key)))
    for name in mine.keys() & other.keys():
        section = f"data.mixture.{name}." if config.data.mixture else "data."
        keys = [field.name for field in fields(SourceConfig)]
        facts += [(section + key, getattr(other[name], key), getattr(mine[name], key)) for key in keys]
    path = config.data.tokenizer.path
    if path is not None and (Path(path) / "tokenizer.json").exists():
        digest = sha256_file(Path(path) / "tokenizer.json")
        facts.append(("data.tokenizer.path, by its digest,", teacher.tokenizer_sha256[:12], digest[:12]))
    for what, before, now in facts:
        if before != now:
            raise RunError(
                f"{what} is {before} for the teacher {teacher.name} and {now} for the student",
                where=what,
                mend="train the student on the teacher's text, with its tokenizer",
            )


def needed_tokens(config: RunConfig, teacher: Ensemble, runs: Path, share: Fraction, alone: bool = False) -> int:
    """Synthetic tokens that a student draws in all, so that a pool of as many is passed once; `alone`: one without real text,
    which draws all tokens of the mixture's stream.

    Raises:
        RunError: as `recipe.config_of`.
    """
    if alone:
        return _stream(config, teacher, runs, share) * config.data.sequence_length
    number, unit = split_length(config.train.length)
    if unit == "tokens":
        real = Fraction(math.ceil(number / config.data.sequence_length))
    elif unit == "steps":
        real = Fraction(int(number) * config.train.tokens_per_step, config.data.sequence_length)
    else:
        real = Fraction(number) * _sequences(config, teacher, runs, unit.removeprefix("epochs of "))
    return math.ceil(real * share / (1 - share)) * config.data.sequence_length


def student_of_text(config: RunConfig, table: Path, share: Fraction) -> RunConfig:
    """The configuration of a student: the real text of `config` with weight 1 - share, the synthetic table with weight share.

    Steps become base / (1 - share), so that real text is passed as often as `config` says.

    Args:
        config: a run on the teacher's text (see `check_teacher`); its name is the student's.
        table: of synthetic text, finished.

    Raises:
        RunError: the configuration is not valid so, such as a share too fine for a mixture.
    """
    from trainer import config as configuration
    from trainer.config_data import SINGLE, SourceConfig, sources_of, weights_of

    raw = configuration.resolved(config)
    data, weights = raw["data"], weights_of(config.data)
    keys = [field.name for field in fields(SourceConfig)]
    mixture = {}
    for name in sources_of(config.data):
        source = data["mixture"][name] if config.data.mixture else {key: data[key] for key in keys}
        mixture[REAL if name == SINGLE else name] = {**source, "weight": str(weights[name] * (1 - share))}
    if SYNTHETIC in mixture:
        raise RunError(
            f"data.mixture has a source {SYNTHETIC} already",
            where=f"data.mixture.{SYNTHETIC}",
            mend="give it another name",
        )
    mixture[SYNTHETIC] = {"table": str(table), "weight": str(share)}
    rest = {key: value for key, value in data.items() if key not in keys}
    tokenizer = {**data["tokenizer"], "path": str(table / "tokenizer")}
    train = {**raw["train"], "length": _length(config, share)}
    return configuration.parse({**raw, "data": {**rest, "mixture": mixture, "tokenizer": tokenizer}, "train": train})


def without_real_text(student: RunConfig, tokens: int) -> RunConfig:
    """The student of `student_of_text` on synthetic text alone, in as many steps: the control of what real text is worth.

    Real text keeps its place in validation, with the weight 0.

    Args:
        tokens: of the whole stream of that student (`needed_tokens`, alone).
    """
    from trainer import config as configuration

    raw = configuration.resolved(student)
    for name, source in raw["data"]["mixture"].items():
        source.update({"weight": "1"} if name == SYNTHETIC else {"weight": "0", "subset_tokens": None})
    raw["train"]["length"] = f"{tokens} tokens"
    return configuration.parse(raw)


def _length(config: RunConfig, share: Fraction) -> str:
    """The student's length: passes stay passes over the real text, all else becomes longer by 1 / (1 - share)."""
    number, unit = split_length(config.train.length)
    if unit == "epochs":
        return f"{number:g} epochs of {REAL}"
    if unit.startswith("epochs"):
        return config.train.length
    return f"{math.ceil(Fraction(int(number)) / (1 - share))} {unit}"


def _stream(config: RunConfig, teacher: Ensemble, runs: Path, share: Fraction) -> int:
    """Sequences of the whole stream of a student of text: real ones and synthetic ones."""
    from trainer.config_data import weights_of
    from trainer.data.mixture import Passes
    from trainer.derive import derive

    student = student_of_text(config, Path(SYNTHETIC), share)
    sizes = {name: _size(teacher, runs, name) for name in weights_of(student.data)}
    return derive(student, 1, Passes(weights_of(student.data), sizes)).sequences


def _sequences(config: RunConfig, teacher: Ensemble, runs: Path, name: str) -> Fraction:
    """Sequences of the real stream in one pass over its source `name`, from what the teacher's checkpoint recorded."""
    from trainer.config_data import weights_of

    weights = weights_of(config.data)
    weight = weights[name] if name in weights else Fraction(1)
    return Fraction(_size(teacher, runs, name)) / weight


def _size(teacher: Ensemble, runs: Path, name: str) -> int:
    """Sequences of a source that the teacher was trained on; those of its only one go by any name."""
    from trainer.checkpoint import manifest as manifests

    first = teacher.members[0]
    sources = manifests.read(manifests.find(runs / first.run, first.step)).state["data"]["sources"]
    found = sources[name] if name in sources else next(iter(sources.values()))
    return int(found.get("subset", found["sequences"]))
