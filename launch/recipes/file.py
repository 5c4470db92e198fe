"""The file of a recipe: which sizes and amounts of text, what is searched, which ensembles and students (docs/recipes.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, TypeAdapter

from launch.distilling import share_of
from trainer import config as configuration
from trainer.config import RunConfig
from trainer.outcome import RunError
from trainer.registry import STRICT
from trainer.units import Count
from trainer.yaml_source import Source, nearest

Above = Annotated[float, Field(gt=0)]
Values = Annotated[list[Above], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]{0,29}$")]


@dataclass(frozen=True, kw_only=True)
class Standard:
    """The usual recipe: a grid over epochs and rate at one weight decay."""

    __pydantic_config__ = STRICT
    epochs: Values
    lr: Values
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Regularized:
    """Coordinate descent over epochs, rate and weight decay, as `orthogon tune` does it."""

    __pydantic_config__ = STRICT
    epochs: Values
    lr: Values
    weight_decay: Values
    start: Annotated[list[Above], Field(min_length=3, max_length=3)]
    """Epochs, rate and weight decay of the first cross."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of a loss over seeds, in nats."""
    most_runs: Annotated[int, Field(gt=0)] | None = None
    """Runs that one search starts at most; it ends without a certificate then."""
    row: bool = False
    """Also train every weight decay at the certified optimum of a full search: the whole curve over the decay, ends included."""
    most_epochs: Above = 64.0
    most_lr: Above = 0.03


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model of the recipe: what it changes of the run's `model.config`."""

    __pydantic_config__ = STRICT
    model: dict[str, Any] = field(default_factory=dict)
    standard: bool = True
    """Whether the standard grid is run at this size."""
    search: Literal["full", "decay"] = "full"
    """`full`: descent of its own, from the optimum of the size before. `decay`: a grid over the decay alone, at the epochs of the
    first size's optimum."""
    decays: Values = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """With `decay`: factors of the first size's weight decay."""
    lr: Above | None = None
    """With `decay`: the rate; none takes the first size's."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """An ensemble: runs at the optimum that differ in seeds, with its epochs and decay times a factor."""

    __pydantic_config__ = STRICT
    count: Annotated[int, Field(gt=1)]
    epochs: Above = 1.0
    weight_decay: Above = 1.0
    sizes: list[str] | None = None
    """Sizes that have such an ensemble; none: all."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A run that learns from an ensemble of its own size."""

    __pydantic_config__ = STRICT
    teacher: str
    """The name of the ensemble in `members`."""
    kind: Literal["text", "self", "synthetic", "logits"]
    """`text`: real text and synthetic text of the pool of members; `self`: and of its first member alone; `synthetic`: the pool's
    text alone, in as many steps as `text` takes; `logits`: distributions of the ensemble."""
    epochs: Above | None = None
    """Passes over the real text; none takes those of the optimum."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """None takes that of the optimum."""
    share: str = "3/4"
    """Of text and self: the synthetic share of the stream; of synthetic: that of the stream whose steps it takes."""
    tokens: Annotated[Count, Field(gt=0)] | None = None
    """Of all but logits: size of the synthetic pool; none: as many as are drawn."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of logits: weight of the teacher."""
    form: Literal["hidden", "top-k", "sampled"] = "hidden"
    """Of logits: how the teacher's targets are cached."""
    seeds: Annotated[int, Field(gt=0)] = 1
    """Students that differ in their seeds."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe."""

    __pydantic_config__ = STRICT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    """The first part of all names of its runs, and the folder of its report."""
    config: str
    """The run that all runs are made of: a YAML file, relative to this one."""
    subsets: list[Annotated[Count, Field(gt=0)]] = field(default_factory=list)
    """Amounts of text in tokens, nested; none takes the run's `data.subset_tokens`."""
    sizes: Annotated[dict[Name, Size], Field(min_length=1)]
    """Models by name, in the order in which they are tuned."""
    standard: Standard
    regularized: Regularized
    members: dict[Name, Members] = field(default_factory=dict)
    students: dict[Name, Student] = field(default_factory=dict)
    student_size: Name | None = None
    """The model of the students; none: the first size."""
    tasks: list[str] = field(default_factory=list)
    """Multiple-choice tasks that all runs and ensembles answer (JSONL, as for `orthogon evaluate`), relative to this file."""
    budget: Above | None = None
    """FLOPs; the recipe stops before a stage that would pass it."""
    inequalities: bool = False
    """Judge the inequalities that were registered for the miniature protocol, in the report."""


_adapter: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def read(path: Path, overrides: list[str]) -> tuple[Recipe, RunConfig]:
    """A recipe and the run that it is made of; `overrides` change the run.

    Raises:
        RunError: a key or value is not right, names do not fit each other, or the amount of text is open.
    """
    source = Source.read(path)
    try:
        recipe = _adapter.validate_json(json.dumps(source.raw))
    except pydantic.ValidationError as error:
        raise _explained(error, source) from None
    _check(recipe, source)
    recipe = replace(recipe, tasks=[str(path.parent / task) for task in recipe.tasks])
    for task in recipe.tasks:
        if not Path(task).is_file():
            raise RunError(f"there is no task {task}", where=source.where("tasks"), mend="check the path")
    config = configuration.load(path.parent / recipe.config, [*overrides, f"--name={recipe.name}"])
    if config.data.mixture or (config.data.subset_tokens is None and not recipe.subsets):
        raise RunError(
            "a recipe is about a fixed amount of one text",
            where=f"{path.parent / recipe.config}: data",
            mend="give data.path and data.subset_tokens, or subsets in the recipe",
        )
    return recipe, config


def _explained(error: pydantic.ValidationError, source: Source) -> RunError:
    first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    here = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        known = sorted({key for kind in (Recipe, Standard, Regularized, Size, Members, Student)
                        for key in kind.__dataclass_fields__})  # fmt: skip
        guess = nearest(str(first["loc"][-1]), known)
        mend = f"did you mean {guess}?" if guess else "see docs/recipes.md"
        return RunError(f"unknown key {here}", where=source.where(here), mend=mend)
    if first["type"].startswith("missing"):
        return RunError(f"{here} is missing", where=source.where(here), mend=f"add {here}")
    said = first["msg"][0].lower() + first["msg"][1:]
    return RunError(f"{here}: {said} (it is {first['input']!r})", where=source.where(here), mend=f"correct {here}")


def _check(recipe: Recipe, source: Source) -> None:
    """What no single field can know."""
    for key, value, axis in zip(
        ("epochs", "lr", "weight_decay"), recipe.regularized.start,
        (recipe.regularized.epochs, recipe.regularized.lr, recipe.regularized.weight_decay), strict=True,
    ):  # fmt: skip
        if value not in axis:
            raise RunError(
                f"regularized.start has {key} {value:g}, which is none of regularized.{key}",
                where=source.where("regularized.start"),
                mend=f"use one of {', '.join(f'{v:g}' for v in axis)}",
            )
    if next(iter(recipe.sizes.values())).search != "full":
        raise RunError(
            "the first size has search: decay, and there is no optimum before it",
            where=source.where("sizes"),
            mend="give it search: full",
        )
    for name, members in recipe.members.items():
        for size in members.sizes or []:
            _known(f"members.{name}.sizes", size, list(recipe.sizes), source)
    _known("student_size", size_of_students(recipe), list(recipe.sizes), source)
    for name, student in recipe.students.items():
        _known(f"students.{name}.teacher", student.teacher, list(recipe.members), source)
        if student.kind != "logits":
            try:
                share_of(student.share)
            except RunError as error:
                where = source.where(f"students.{name}.share")
                raise RunError(error.what.replace("--share", "share"), where=where, mend=error.mend) from None
        sizes = recipe.members[student.teacher].sizes
        if sizes is not None and size_of_students(recipe) not in sizes:
            raise RunError(
                f"students.{name} learns from {student.teacher}, which size {size_of_students(recipe)} does not have",
                where=source.where(f"students.{name}.teacher"),
                mend=f"add {size_of_students(recipe)} to members.{student.teacher}.sizes",
            )


def size_of_students(recipe: Recipe) -> str:
    """The name of the size that students have."""
    return recipe.student_size or next(iter(recipe.sizes))


def _known(where: str, name: str, names: list[str], source: Source) -> None:
    if name not in names:
        guess = nearest(name, names)
        mend = f"did you mean {guess}?" if guess else f"use one of {', '.join(names) or 'none: there are none'}"
        raise RunError(f"{where}: there is no '{name}'", where=source.where(where), mend=mend)
