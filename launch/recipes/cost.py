"""What a recipe costs, before anything runs: runs, tokens and FLOPs, as `orthogon plan` counts them, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.recipes import cells as made
from launch.recipes.file import Recipe, size_of_students

if TYPE_CHECKING:
    from trainer.config import RunConfig

SEARCH_RUNS = 9
"""Runs that a descent is counted with, where the recipe states no most: a cross of seven and one more row."""


@dataclass(frozen=True)
class Cost:
    """One stage of one cell."""

    stage: str
    cell: str
    parameters: int
    runs: int
    tokens: float
    flops: float


def preview(
    recipe: Recipe, config: RunConfig, shapes: Callable[[RunConfig], dict[str, Any]], known: Mapping[str, made.Optimum]
) -> list[Cost]:
    """Costs of all stages.

    Args:
        shapes: the footprint of a configuration's model.
        known: optima by cell; where none is known yet, the start of the search stands for it.
    """
    found = []
    epochs, lr, decay = recipe.regularized.start
    for cell in made.cells(recipe, config):
        record = shapes(cell.config)
        size = record["flops_per_token"], parameters(record)
        optimum = known.get(cell.name) or {"epochs": epochs, "lr": lr, "weight_decay": decay}

        def cost(stage: str, runs: int, passes: float, cell: made.Cell = cell, size: Any = size) -> Cost:
            tokens = passes * cell.tokens
            return Cost(stage, cell.name, size[1], runs, tokens, tokens * size[0])

        if cell.of.standard:
            grid = recipe.standard
            found.append(cost("standard", len(grid.epochs) * len(grid.lr), sum(grid.epochs) * len(grid.lr)))
        runs = len(cell.of.decays) if cell.of.search == "decay" else recipe.regularized.most_runs or SEARCH_RUNS
        found.append(cost("regularized", runs, runs * optimum["epochs"]))
        if recipe.regularized.row and cell.of.search == "full":  # the search trains the optimum and its two neighbours
            more = max(len(recipe.regularized.weight_decay) - 3, 0)
            found.append(cost("row", more, more * optimum["epochs"]))
        for kind, of in recipe.members.items():
            if of.sizes is None or cell.size in of.sizes:
                new = of.count - (of.epochs == of.weight_decay == 1)
                found.append(cost(f"members {kind}", new, new * optimum["epochs"] * of.epochs))
        if cell.size == size_of_students(recipe):
            for name, one in recipe.students.items():
                passes = (one.epochs or optimum["epochs"]) * made.stream(one)
                found.append(cost(f"student {name}", one.seeds, one.seeds * passes))
    return found


def table(costs: list[Cost]) -> list[str]:
    """The preview for people."""
    lines = [f"{'stage':22} {'cell':32} {'parameters':>13} {'runs':>5} {'tokens':>9} {'FLOPs':>9}"]
    for one in costs:
        lines.append(
            f"{one.stage:22} {one.cell:32} {one.parameters:13,} {one.runs:5} {one.tokens:9.3g} {one.flops:9.3g}"
        )
    runs, tokens, flops = (sum(getattr(one, key) for one in costs) for key in ("runs", "tokens", "flops"))
    lines.append(f"{'all':22} {'':32} {'':13} {runs:5} {tokens:9.3g} {flops:9.3g}")
    return lines


def parameters(record: dict[str, Any]) -> int:
    """Parameters of a model, embeddings among them, from its footprint."""
    return sum(math.prod(parameter["shape"]) for parameter in record["parameters"])
