"""All numbers of a recipe from what its runs left behind: run folders, certificates, measurements. Nothing is typed in."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evidence
from launch.recipes import cells as made
from launch.recipes.cost import parameters
from launch.recipes.measure import Measure
from launch.recipes.stages import Work
from launch.shapes import shapes
from launch.tuning import Certificate
from trainer.files import sha256_file
from trainer.outcome import RunError
from trainer.units import split_length

if TYPE_CHECKING:
    from trainer.config import RunConfig

LAST_STEPS = 16
"""Steps whose training losses are averaged for the last one of a run."""
LEAST_POINTS = 3
"""Different values of an axis that a law needs."""


def collect(work: Work) -> dict[str, Any]:
    """Measure what is not measured yet, and put everything together.

    Raises:
        RunError: a run, its checkpoint or a measurement is not there.
    """
    data = work.config.data
    split = "test" if data.test_path is not None or data.test_fraction is not None else "validation"
    measure = Measure(work.runs, work.folder, work.say, work.recipe.tasks)
    rows = {row["run"]: row for row in listed(work)}
    found = measure.all_runs(list(rows), split, work.at_once)
    for name, row in rows.items():
        row["loss"] = found[name][split]["loss"]
        row["tasks"] = found[name].get("tasks", {})
    ensembles = {}
    for name, ensemble in work.ensembles.items():
        work.say(f"{name}: {split} losses of its subsets")
        answer = measure.ensemble(name, split)
        ensembles[name] = ensemble | {key: answer[key] for key in ("curves", "members", "text")}
        ensembles[name]["members"] = [one["run"] for one in answer["members"]]
        ensembles[name]["tasks"] = answer.get("tasks", {})
    results = {
        "recipe": work.recipe.name,
        "split": split,
        "first": made.cells(work.recipe, work.config)[0].name,
        "cells": {
            cell.name: {"size": cell.size, "tokens": cell.tokens, "parameters": parameters(shapes(cell.config))}
            for cell in made.cells(work.recipe, work.config)
        },
        "decays": work.recipe.regularized.weight_decay,
        "runs": rows,
        "standard": {name: summary(one, None) for name, one in work.standard.items()},
        "regularized": {
            name: summary(one, work.recipe.regularized.most_runs) for name, one in work.regularized.items()
        },
        "ensembles": ensembles,
        "students": work.students,
    }
    results["laws"] = laws(work, results, measure)
    return results


def listed(work: Work) -> Iterable[dict[str, Any]]:
    """A row for every run that finished, by stage; twice, and the same, for one that a search and the whole curve have."""
    for stage in ("standard", "regularized"):
        for cell, certificate in getattr(work, stage).items():
            for one in certificate.cells:
                if one["loss"] is not None:
                    yield row(work.runs, one["run"], stage, cell)
    for cell, names in work.rows.items():
        for name in names:
            yield row(work.runs, name, "regularized", cell)
    tuned = {certificate.point["run"] for certificate in work.regularized.values()}
    for ensemble in work.ensembles.values():
        for run in ensemble["members"]:
            if run not in tuned:
                yield row(work.runs, run, f"members {ensemble['kind']}", ensemble["cell"])
    for run, student in work.students.items():
        yield row(work.runs, run, f"student {student['student']}", student["cell"])


def row(runs: Path, name: str, stage: str, cell: str) -> dict[str, Any]:
    """A run's settings and its losses in training and on validation text."""
    from trainer import config as configuration

    config: RunConfig = configuration.load(runs / name / "config.yaml")
    history = evidence.last_records(runs / name / "metrics.jsonl", '"gradient_norm"', LAST_STEPS)
    checks = evidence.last_records(runs / name / "metrics.jsonl", '"validation_loss"', 1)
    planned = evidence.last_records(runs / name / "events.jsonl", '"event": "planned"', 1)
    # The loss of a student of logits is mostly its distance from its teacher: its cross-entropy is what others call loss.
    losses = [one.get("cross_entropy", one["loss"]) for one in history if one.get("loss") is not None]
    if not losses or not checks:
        raise RunError(
            f"run {name} has no losses on record", where=str(runs / name / "metrics.jsonl"), mend="train it again"
        )
    number, unit = split_length(config.train.length)
    return {
        "run": name, "stage": stage, "cell": cell, "seed": config.seed,
        "epochs": float(number) if unit.startswith("epochs") else None, "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay, "steps": planned[0]["steps"] if planned else None,
        "train_loss": statistics.mean(losses), "validation_loss": checks[0]["validation_loss"],
    }  # fmt: skip


def summary(certificate: Certificate, most: int | None) -> dict[str, Any]:
    """What the report says of a search that starts `most` runs in all."""
    keys = ("certified", "point", "neighbours", "missing", "noise", "moves")
    stopped = f"it ends at most_runs = {most}" if certificate.stopped else ""
    return {key: getattr(certificate, key) for key in keys} | {"stopped": stopped}


def laws(work: Work, results: dict[str, Any], measure: Measure) -> dict[str, Any]:
    """Fits over K of every ensemble and, where there are enough, over N and D; with the tables beside the report.

    A table whose axis has fewer than three values is named with the reason in place of a fit.
    """
    noise = work.recipe.regularized.noise
    found: dict[str, Any] = {}
    for name, axis, points in points_of(results):
        values: dict[str, set[float]] = {}
        for point in points:
            values.setdefault(point["recipe"], set()).add(point[axis])
        enough = {recipe for recipe, some in values.items() if len(some) >= LEAST_POINTS}
        if not enough or (axis == "d" and "standard" not in enough):
            found[name] = {"why not": f"a law over {axis} takes {LEAST_POINTS} values or more"}
            continue
        path = work.folder / f"points-{name}.csv"
        save(path, [point for point in points if point["recipe"] in enough])
        words = ["laws", "fit", str(path), "--json", *([f"--noise={noise}"] if noise else [])]
        words += ["--baseline=standard"] if axis == "d" else []
        facts = {"table": sha256_file(path), "noise": noise}
        found[name] = measure.kept(f"laws-{name}", facts, partial(measure.answer, *words))
    return found


def points_of(results: dict[str, Any]) -> Iterable[tuple[str, str, list[dict[str, Any]]]]:
    """The tables of the laws: (name, axis, points), over members, sizes, and amounts of text."""
    runs, cells, ensembles = results["runs"], results["cells"], results["ensembles"]
    yield (
        "members",
        "k",
        [
            {"recipe": name, "k": point["members"], "loss": point["loss"]}
            for name, one in ensembles.items()
            for point in one["curves"]["logit mean"]
        ],
    )
    single = [
        {"n": cell["parameters"] / 1e9, "d": cell["tokens"] / 1e9, "loss": runs[results["regularized"][name]["point"]["run"]]["loss"]}
        for name, cell in cells.items()
    ]  # fmt: skip
    yield (
        "sizes",
        "n",
        [
            {"recipe": f"regularized, {round(one['d'] * 1e9)} tokens", "n": one["n"], "loss": one["loss"]}
            for one in single
        ],
    )
    best: dict[int, float] = {}
    for name, standard in results["standard"].items():
        tokens, loss = cells[name]["tokens"], runs[standard["point"]["run"]]["loss"]
        best[tokens] = min(loss, best.get(tokens, loss))
    joint = [
        {"recipe": f"joint, {one['kind']}", "k": point["members"], "loss": point["loss"],
         "n": cells[one["cell"]]["parameters"] / 1e9, "d": cells[one["cell"]]["tokens"] / 1e9}
        for one in ensembles.values()
        for point in one["curves"]["logit mean"]
    ]  # fmt: skip
    yield "data", "d", [
        *({"recipe": "standard", "d": tokens / 1e9, "loss": loss} for tokens, loss in best.items()),
        *({"recipe": "regularized", **one} for one in single), *joint,
    ]  # fmt: skip


def save(path: Path, points: list[dict[str, Any]]) -> None:
    """The table of a fit, as `orthogon laws fit` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["recipe", "k", "n", "d", "loss"], restval="")
        writer.writeheader()
        writer.writerows(points)
