"""The runs of a recipe: one cell per size and amount of text, and what each stage makes of it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launch.distilling import share_of
from launch.recipes.file import Members, Recipe, Size, Student
from launch.tuning import Search
from launch.tuning_cells import Space

if TYPE_CHECKING:
    from trainer.config import RunConfig

Optimum = Mapping[str, Any]
"""epochs, lr, weight_decay and run, as in a certificate."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one amount of text."""

    name: str
    size: str
    of: Size
    tokens: int
    config: RunConfig


def cells(recipe: Recipe, config: RunConfig) -> list[Cell]:
    """All cells, the amounts of text one after another, the sizes in the order of the file."""
    amounts = recipe.subsets or [config.data.subset_tokens or 0]
    found = []
    for tokens in amounts:
        for size, of in recipe.sizes.items():
            name = f"{recipe.name}-{size}" + (f"-{tokens}" if len(amounts) > 1 else "")
            model = replace(config.model, config={**config.model.config, **of.model})
            data = replace(config.data, subset_tokens=tokens)
            found.append(
                Cell(
                    name=name, size=size, of=of, tokens=tokens,
                    config=replace(config, name=name, model=model, data=data),
                )
            )  # fmt: skip
    return found


def standard(recipe: Recipe, cell: Cell) -> Search:
    """The grid of the usual recipe."""
    one = recipe.standard
    config = replace(cell.config, name=f"{cell.name}-std")
    return Search(config=config, space=_space(recipe, one.epochs, one.lr, [one.weight_decay]), method="grid")


def regularized(recipe: Recipe, cell: Cell, first: Optimum | None, before: Optimum | None) -> Search:
    """The search of a cell.

    Args:
        first: the optimum of the first size on this amount of text; None for that itself.
        before: the optimum of the size before, where a descent starts; None: at the recipe's start.
    """
    one = recipe.regularized
    if cell.of.search == "decay":
        assert first is not None
        decay = float(first["weight_decay"])
        space = _space(
            recipe, [first["epochs"]], [cell.of.lr or first["lr"]], [float(f"{decay * f:.6g}") for f in cell.of.decays]
        )
        return Search(config=cell.config, space=space, method="grid", noise=one.noise)
    start = one.start if before is None else [before[key] for key in ("epochs", "lr", "weight_decay")]
    axes = [
        sorted({*values, value}) for values, value in zip((one.epochs, one.lr, one.weight_decay), start, strict=True)
    ]
    return Search(
        config=cell.config, space=_space(recipe, *axes), start=(start[0], start[1], start[2]), noise=one.noise,
        most_runs=one.most_runs,
    )  # fmt: skip


def row(recipe: Recipe, cell: Cell, optimum: Optimum) -> list[RunConfig]:
    """Every weight decay of the lattice at the epochs and rate of an optimum, under the names that a search gives them."""
    epochs, lr = float(optimum["epochs"]), float(optimum["lr"])
    space = _space(recipe, [epochs], [lr], recipe.regularized.weight_decay)
    return [space.cell(cell.config, (epochs, lr, decay)) for decay in space.decay]


def members(cell: Cell, kind: str, of: Members, optimum: Optimum, recipe: Recipe) -> tuple[list[str], list[RunConfig]]:
    """(names of all members, those that are to be run): at the optimum itself its run is the first."""
    own = of.epochs == of.weight_decay == 1
    made = at(recipe, cell, optimum, of.epochs, of.weight_decay)
    configs = [seeded(made, f"{cell.name}-{kind}-{k}", k) for k in range(1 if own else 0, of.count)]
    return ([str(optimum["run"])] if own else []) + [config.name for config in configs], configs


def student(cell: Cell, name: str, of: Student, optimum: Optimum, recipe: Recipe, seed: int) -> RunConfig:
    """A student before it has a teacher."""
    epochs = of.epochs or optimum["epochs"]
    decay = optimum["weight_decay"] if of.weight_decay is None else of.weight_decay
    made = _space(recipe, [epochs], [optimum["lr"]], [decay]).cell(cell.config, (epochs, optimum["lr"], decay))
    return seeded(made, f"{recipe.name}-{name}-{seed}", 100 + seed)


def at(recipe: Recipe, cell: Cell, optimum: Optimum, epochs: float = 1.0, decay: float = 1.0) -> RunConfig:
    """The run at a multiple of an optimum's epochs and decay."""
    point = (
        float(f"{optimum['epochs'] * epochs:.6g}"),
        float(optimum["lr"]),
        float(f"{optimum['weight_decay'] * decay:.6g}"),
    )
    return _space(recipe, *([value] for value in point)).cell(cell.config, point)


def seeded(config: RunConfig, name: str, more: int) -> RunConfig:
    """The run under another name, with other weights and another order of the same text."""
    data = replace(config.data, order_seed=config.data.order_seed + more)
    return replace(config, name=name, seed=config.seed + more, data=data)


def stream(of: Student) -> float:
    """How many times longer a student's stream is than its passes over the real text."""
    return 1.0 if of.kind == "logits" else float(1 / (1 - share_of(of.share)))


def _space(recipe: Recipe, epochs: list[float], lr: list[float], decay: list[float]) -> Space:
    one = recipe.regularized
    return Space(
        epochs=tuple(epochs), lr=tuple(lr), decay=tuple(decay), most_epochs=max(one.most_epochs, *epochs),
        most_lr=max(one.most_lr, *lr),
    )  # fmt: skip
