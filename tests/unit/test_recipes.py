"""Recipes: the file, the runs of each stage, costs, the judged inequalities and the page, without any training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from launch.recipes import cells, cost, file, inequalities, page
from trainer.outcome import RunError
from trainer.yaml_source import Source

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes"
OPTIMUM = {"epochs": 16.0, "lr": 3e-3, "weight_decay": 3.2, "run": "mini-base-e16-lr0.003-wd3.2"}


def mini(folder: Path, old: str, new: str) -> Path:
    """A copy of the miniature recipe beside its run, with words replaced."""
    text = (CONFIGS / "infinite-compute-mini.yaml").read_text()
    assert old in text
    text = text.replace(old, new)
    (folder / "mini-run.yaml").write_text((CONFIGS / "mini-run.yaml").read_text())
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["infinite-compute", "infinite-compute-mini", "infinite-compute-paper"])
def test_the_recipes_of_the_project_are_right(name) -> None:
    recipe, config = file.read(CONFIGS / f"{name}.yaml", [])
    found = cells.cells(recipe, config)
    assert [cell.size for cell in found] == list(recipe.sizes)
    assert all(cell.config.data.subset_tokens == config.data.subset_tokens for cell in found)
    assert len({cell.config.name for cell in found}) == len(found)


@pytest.mark.parametrize("size", ["150m", "300m", "600m", "1400m"])
def test_the_papers_models_are_those_of_the_project(size) -> None:
    recipe, config = file.read(CONFIGS / "infinite-compute-paper.yaml", [])
    (cell,) = (cell for cell in cells.cells(recipe, config) if cell.size == f"s{size}")
    known = Source.read(CONFIGS.parent / "models" / f"llama-{size.replace('1400m', '1.4b')}.yaml").raw["model"][
        "config"
    ]
    assert {key: cell.config.model.config[key] for key in known} == known


def test_the_largest_model_has_140_times_the_parameters_that_compute_would_choose() -> None:
    assert page.over_parametrized(1.4e9, 0.2e9) == pytest.approx(140)


def test_overrides_change_the_run_that_all_are_made_of() -> None:
    _, config = file.read(CONFIGS / "infinite-compute-mini.yaml", ["--data.path=text.txt", "--data.test_fraction=null"])
    assert (config.data.path, config.data.test_fraction, config.name) == ("text.txt", None, "mini")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("noise: 0.008", "niose: 0.008", "unknown key regularized.niose"),
    ("start: [16, 0.003, 3.2]", "start: [16, 0.002, 3.2]", "lr 0.002, which is none of regularized.lr"),
    ("teacher: half, kind: text", "teacher: halves, kind: text", "there is no 'halves'"),
    ("sizes: [base]}", "sizes: [bose]}", "there is no 'bose'"),
    ("share: 3/4", "share: 1/1", "share is 1/1: the synthetic share of the stream is above 0 and below 1"),
    ("count: 4, sizes", "count: 1, sizes", "members.tuned.count"),
    ("inequalities: true", "student_size: small", "which size small does not have"),
    ("  base: {}", "  base: {search: decay}", "there is no optimum before it"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_told(old, new, message, tmp_path) -> None:
    with pytest.raises(RunError) as error:
        file.read(mini(tmp_path, old, new), [])
    assert message in error.value.what
    assert "recipe.yaml" in error.value.where


def test_an_open_amount_of_text_is_refused() -> None:
    with pytest.raises(RunError, match="fixed amount of one text"):
        file.read(CONFIGS / "infinite-compute-mini.yaml", ["--data.subset_tokens=null"])


def test_every_stage_makes_its_runs_at_the_optimum() -> None:
    recipe, config = file.read(CONFIGS / "infinite-compute-mini.yaml", [])
    base, small, large = cells.cells(recipe, config)
    names, runs = cells.members(base, "tuned", recipe.members["tuned"], OPTIMUM, recipe)
    assert names == [OPTIMUM["run"], "mini-base-tuned-1", "mini-base-tuned-2", "mini-base-tuned-3"]
    assert [(run.seed, run.data.order_seed) for run in runs] == [(1, 1), (2, 2), (3, 3)]
    names, runs = cells.members(base, "paper", file.Members(count=2, epochs=2, weight_decay=0.5), OPTIMUM, recipe)
    assert names == ["mini-base-paper-0", "mini-base-paper-1"]
    assert {(run.train.length, run.optim.lr, run.optim.weight_decay) for run in runs} == {("32 epochs", 3e-3, 1.6)}
    assert {run.data.subset_seed for run in runs} == {config.data.subset_seed}
    search = cells.regularized(recipe, small, OPTIMUM, OPTIMUM)
    assert (search.method, search.space.decay, search.space.lr) == ("grid", (1.6, 3.2, 6.4), (3e-3,))
    assert cells.regularized(recipe, large, OPTIMUM, OPTIMUM).space.lr == (1e-3,)
    search = cells.regularized(recipe, base, None, {**OPTIMUM, "lr": 2e-3})
    assert search.start == (16.0, 2e-3, 3.2)
    assert search.space.lr == (1e-3, 2e-3, 3e-3, 1e-2)
    row = cells.row(recipe, base, OPTIMUM)
    assert [config.optim.weight_decay for config in row] == recipe.regularized.weight_decay
    (found,) = (config for config in row if config.name == OPTIMUM["run"])  # the search's own, which is not made again
    assert (found.train.length, found.optim.lr) == ("16 epochs", 3e-3)
    student = cells.student(base, "text", recipe.students["text"], OPTIMUM, recipe, 1)
    assert (student.name, student.train.length, student.optim.weight_decay) == ("mini-text-1", "8 epochs", 0.1)
    assert student.seed not in {run.seed for run in runs}


def test_a_preview_counts_runs_tokens_and_flops() -> None:
    recipe, config = file.read(CONFIGS / "infinite-compute-mini.yaml", [])
    shapes = {"parameters": [{"shape": [10, 10]}, {"shape": [5]}], "flops_per_token": 600}
    found = cost.preview(recipe, config, lambda _: shapes, {"mini-base": {**OPTIMUM, "epochs": 8.0}})
    by_stage = {(one.stage, one.cell): one for one in found}
    assert by_stage["standard", "mini-base"].tokens == 2 * (2 + 4 + 8 + 16) * 65536
    assert by_stage["members half", "mini-base"].tokens == 4 * 8 * 65536
    assert by_stage["members tuned", "mini-base"].runs == 3
    text = by_stage["student text", "mini-base"]
    assert (text.tokens, text.flops) == (4 * 8 * 65536, 600 * 4 * 8 * 65536)
    assert {one.parameters for one in found} == {105}
    assert "standard" in cost.table(found)[1]
    assert by_stage["row", "mini-base"].runs == 3  # of six, the search has the optimum and its neighbours
    assert ("row", "mini-large") not in by_stage


# ------------------------------------------------------------------------------------------------ results and page
def run(
    name: str, stage: str, loss: float, epochs: float = 16, lr: float = 3e-3, decay: float = 3.2, **more: Any
) -> dict[str, Any]:
    cell = more.pop("cell", "mini-base")
    return {
        "run": name, "stage": stage, "cell": cell, "seed": 0, "epochs": epochs, "lr": lr, "weight_decay": decay, "steps": 64,
        "train_loss": more.get("train", 2.4), "validation_loss": loss, "loss": loss,
    }  # fmt: skip


def curve(*losses: float) -> list[dict[str, Any]]:
    return [
        {"members": k, "subsets": math.comb(len(losses), k), "loss": loss, "interval": [loss - 0.1, loss + 0.1], "best": loss,
         "worst": loss, "gain": losses[0] - loss, "gain_interval": [losses[0] - loss] * 2}
        for k, loss in enumerate(losses, 1)
    ]  # fmt: skip


def point(name: str, **found: Any) -> dict[str, Any]:
    return {
        "certified": True, "missing": [], "noise": 0.008, "moves": [], "stopped": "",
        "neighbours": [{"axis": "lr", "direction": "up", "edge": True}],
        "point": {"run": name, "epochs": 16.0, "lr": 3e-3, "weight_decay": 3.2, "tau_epochs": 1.6, "loss": 3.4} | found,
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    """The pilot's numbers (reference, section 8.2), as a recipe would find them."""
    rows = [
        run("std-8", "standard", 3.674, 8, decay=0.1, train=2.59), run("std-16", "standard", 4.154, 16, decay=0.1, train=1.43),
        run("low", "regularized", 3.500, decay=1.6), run("best", "regularized", 3.426), run("high", "regularized", 3.572, decay=6.4),
        run("big", "regularized", 3.423, lr=1e-3, decay=6.4, cell="mini-large"),
        run("half-0", "members half", 3.513, decay=1.6), run("logits", "student logits", 3.290),
        run("text", "student text", 3.340), run("self", "student self", 3.385),
    ]  # fmt: skip
    half = {"cell": "mini-base", "kind": "half", "members": ["half-0"]}
    tuned = {"cell": "mini-base", "kind": "tuned", "members": ["best"]}
    both = lambda *losses: {"logit mean": curve(*losses), "probability mean": curve(*losses)}  # noqa: E731
    return {
        "recipe": "mini", "split": "test", "first": "mini-base", "decays": [1.6, 3.2, 6.4], "runs": {row["run"]: row for row in rows},
        "cells": {
            "mini-base": {"size": "base", "tokens": 65536, "parameters": 430752},
            "mini-large": {"size": "large", "tokens": 65536, "parameters": 1970000},
        },
        "standard": {"mini-base": point("std-8")},
        "regularized": {"mini-base": point("best"), "mini-large": point("big")},
        "ensembles": {
            "mini-base-tuned": tuned | {"curves": both(3.426, 3.341, 3.322, 3.306)},
            "mini-base-half": half | {"curves": both(3.500, 3.338, 3.278, 3.248)},
        },
        "students": {
            name: {"student": name, "cell": "mini-base", "seed": 0, "teacher": "mini-base-half"} for name in ("logits", "text", "self")
        },
        "laws": {"members": {"laws": [], "efficiency": []}, "sizes": {"why not": "a law over n takes 3 values or more"}, "data": {"why not": "few"}},
    }  # fmt: skip


def test_the_pilot_keeps_the_registered_inequalities(results) -> None:
    judged = {one.number: one for one in inequalities.judge(results)}
    assert judged["1"].value == pytest.approx(3.674 - 3.426)
    assert judged["2"].value == pytest.approx(4.154 - 3.674)
    assert judged["3"].value == pytest.approx(3.500 - 3.426)
    assert judged["6a"].value == pytest.approx((3.426 - 3.290) / (3.426 - 3.248))
    assert judged["5"].value == pytest.approx(3.423 - 3.248)
    assert all(one.held for one in judged.values() if one.hard)
    assert [n for n, one in judged.items() if one.held is None] == ["8", "10"]
    text = page.page(results, True)
    assert "| 1 | regularized is below the best standard run | hard | +0.10 | +0.2480 | held |" in text
    assert "| 8 | synthetic text alone is worse than mixed | soft | +0.20 |  | no value |" in text
    assert "No law in sizes" in text
    for name in results["runs"]:
        assert name in text


def test_an_end_of_the_lattice_that_was_not_run_leaves_the_third_open(results) -> None:
    results["decays"].append(12.8)
    assert {one.number: one.held for one in inequalities.judge(results)}["3"] is None


def test_accuracies_on_tasks_stand_beside_the_losses(results) -> None:
    answered = lambda value: {"colours": {"accuracy": value, "accuracy_error": 0.012}}  # noqa: E731
    for number, one in enumerate(results["runs"].values()):
        one["tasks"] = answered(0.3 + number / 100)
    for one in results["ensembles"].values():
        one["tasks"] = {"colours": {"ensemble": answered(0.5)["colours"], "members": []}}
    lines = page.main_table(results).splitlines()
    assert lines[0].endswith("| accuracy, colours |")
    assert lines[2].endswith("| std-8 | 0.300 ± 0.012 |")
    assert sum("0.500 ± 0.012" in line for line in lines) == 2
    assert len({line.count("|") for line in lines}) == 1


def test_a_task_that_is_not_there_is_told(tmp_path) -> None:
    with pytest.raises(RunError, match="there is no task .*colours.jsonl"):
        file.read(mini(tmp_path, "inequalities: true", "tasks: [colours.jsonl]"), [])


def test_what_was_not_run_is_told_as_that(results) -> None:
    results["ensembles"], results["students"], results["laws"]["members"] = {}, {}, {"why not": "there is none"}
    judged = {one.number: one.held for one in inequalities.judge(results)}
    assert {number for number, held in judged.items() if held is not None} == {"2", "3", "9"}
    assert "None." in page.page(results, True)


@pytest.mark.parametrize(("number", "harm"), [
    ("1", lambda r: r["runs"]["std-8"].update(loss=3.45)),
    ("2", lambda r: r["runs"]["std-16"].update(train_loss=3.0)),
    ("3", lambda r: r["runs"]["high"].update(loss=3.43)),
    ("4a", lambda r: r["ensembles"]["mini-base-tuned"]["curves"]["logit mean"][1].update(loss=3.40)),
    ("4b", lambda r: r["ensembles"]["mini-base-half"]["curves"]["logit mean"][1].update(loss=3.42)),
    ("4c", lambda r: r["ensembles"]["mini-base-half"]["curves"]["logit mean"][3].update(loss=3.29)),
    ("5", lambda r: r["runs"]["big"].update(loss=3.2)),
    ("5'", lambda r: r["runs"]["best"].update(loss=3.2)),
    ("5b", lambda r: r["ensembles"]["mini-base-half"]["curves"]["logit mean"][0].update(loss=3.40)),
    ("6a", lambda r: r["runs"]["logits"].update(loss=3.35)),
    ("6b", lambda r: r["runs"]["text"].update(loss=3.40)),
    ("7a", lambda r: r["runs"]["text"].update(loss=3.43)),
    ("7b", lambda r: r["runs"]["half-0"].update(loss=3.38)),
    ("7c", lambda r: r["runs"]["self"].update(loss=3.43)),
    ("9", lambda r: r["runs"]["big"].update(loss=3.44)),
])  # fmt: skip
def test_an_inequality_that_fails_is_told(number, harm, results) -> None:
    before = copy.deepcopy(results)
    harm(results)
    assert {one.number: one.held for one in inequalities.judge(before)}[number] is True
    assert {one.number: one.held for one in inequalities.judge(results)}[number] is False
