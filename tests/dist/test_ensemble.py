"""Ensembles of tiny runs: the same numbers on any number of ranks, and those of the members' own evaluation."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist import bodies_run, bodies_tools
from tests.dist.test_cli import finished
from trainer import runfolder
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.average import mean
from trainer.checkpoint.export import restored_model
from trainer.data.table import Split
from trainer.ensemble import manifest
from trainer.evaluate.choices import read_questions, row
from trainer.evaluate.text import load_tokenizer
from trainer.model.build import model_tensors

MEMBERS = ["tiny", "tiny-1", "tiny-2"]


@pytest.fixture(scope="module")
def runs(group, tiny) -> Path:
    """The tiny run, two more under other seeds, and their ensemble `three`."""
    for k in (1, 2):
        seeds = [f"--name=tiny-{k}", f"--seed={k}", f"--data.order_seed={k}", "--evaluate.prompts=[]"]
        assert group(2, bodies_run.train, tiny.yaml, seeds)[0]["outcome"] == "finished"
    runs = tiny.place / "runs"
    ensemble = manifest.make("three", runs, MEMBERS, "logit mean")
    manifest.write(runs, ensemble)
    first = ensemble.members[0]
    manifest.write(runs, replace(ensemble, name="one", members=(first,)))
    manifest.write(runs, replace(ensemble, name="copies", members=(first,) * 3))  # which `make` refuses
    manifest.write(runs, replace(ensemble, name="turned", members=ensemble.members[::-1], rule="probability mean"))
    return runs


@pytest.fixture(scope="module")
def task(tiny) -> Path:
    path = tiny.place / "ensemble-words.jsonl"
    words = ["the", "sea", "light", "over the", "stones", "birds"]
    questions = [
        {"query": f"the {a} of", "choices": [f" {b}" for b in words[i % 3 :]], "gold": i % 2}
        for i, (a, b) in enumerate((a, b) for a in words for b in words[:2])
    ]
    path.write_text("\n".join(json.dumps(q) for q in questions))
    return path


@pytest.fixture(scope="module")
def three(group, runs, task) -> dict:
    return group(2, bodies_tools.evaluate_ensemble, str(runs), "three", [str(task)], [])[0]


def losses(found: dict, rule: str = "logit mean") -> list[float]:
    return [point["loss"] for point in found["curves"][rule]]


@cache
def member(run: Path) -> Any:
    checkpoint, facts = manifests.pick(run)
    return restored_model(run, checkpoint, facts).double()


def logits(runs: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (members, rows, tokens, vocabulary) of whole models in float64."""
    with torch.no_grad():
        return torch.stack([member(runs / name)(ids).logits for name in MEMBERS])


def test_the_result_is_the_same_on_1_2_3_ranks(group, runs, task, three) -> None:
    for world in (1, 3):
        for answer in group(world, bodies_tools.evaluate_ensemble, str(runs), "three", [str(task)], []):
            assert answer == three
    overrides = ["--parallel={name: ddp}", "--train.loss_chunk=5"]
    other = group(2, bodies_tools.evaluate_ensemble, str(runs), "three", [], overrides)[0]
    assert other["curves"] == three["curves"]


def validation_rows(runs: Path) -> torch.Tensor:
    """All sequences of the validation split (n, L + 1)."""
    table = next(Path(e["tables"]["data"]["table"]) for e in runfolder.events(runs / "tiny") if "tables" in e)
    split = Split(table / json.loads((table / "table.json").read_text())["splits"]["validation"]["file"])
    return torch.from_numpy(split.rows(np.arange(split.sequences))[0])


def test_averaged_weights_of_independent_members_are_no_ensemble_and_of_copies_are_the_member(runs, three) -> None:
    """Oracle 20: what an ensemble gains is not in the weights."""
    rows = validation_rows(runs)

    def of_average(names: list[str]) -> float:
        folders = [manifests.pick(runs / name)[0] for name in names]
        model = deepcopy(member(runs / names[0])).float()
        for key, tensor in model_tensors(model).items():
            tensor.copy_(mean(key, tensor, folders, [1 / len(names)] * len(names)))
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    single = three["curves"]["logit mean"][0]
    assert of_average(["tiny"] * 3) == of_average(["tiny"]) == pytest.approx(three["members"][0]["loss"], abs=1e-6)
    assert of_average(MEMBERS) > single["worst"] + 10 * (single["loss"] - losses(three)[-1])


def test_losses_are_those_of_whole_logits_in_float64(runs, three) -> None:
    rows = validation_rows(runs)
    whole = logits(runs, rows[:, :-1])
    pairs = [[0], [1], [2]], [[0, 1], [0, 2], [1, 2]], [[0, 1, 2]]
    for rule in manifest.RULES:
        for size, subsets in enumerate(pairs):
            expected = []
            for subset in subsets:
                some = whole[subset]
                logs = some.mean(0).log_softmax(-1) if rule == "logit mean" else some.softmax(-1).mean(0).log()
                expected.append(-float(logs.gather(2, rows[:, 1:, None]).mean()))
            point = three["curves"][rule][size]
            assert point["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
            assert (point["best"], point["worst"]) == pytest.approx((min(expected), max(expected)), abs=1e-6)
    assert three["text"]["tokens"] == rows[:, 1:].numel()
    assert losses(three)[2] < losses(three)[0] - 1e-4
    assert three["curves"]["logit mean"][2]["gain_interval"][0] > 0


def test_one_member_is_the_plain_evaluation_and_copies_and_order_change_nothing(group, tiny, runs, task, three) -> None:
    for name, loss in zip(MEMBERS, [m["loss"] for m in three["members"]], strict=True):
        plain = group(2, bodies_tools.evaluate, str(runs / name), [str(task)], [])[0]
        assert loss == pytest.approx(plain["validation"]["loss"], abs=1e-6)
        if name == "tiny":
            one = group(2, bodies_tools.evaluate_ensemble, str(runs), "one", [str(task)], [])[0]
            assert losses(one) == losses(one, "probability mean") == [pytest.approx(loss, abs=1e-6)]
            assert one["curves"]["logit mean"][0]["bits_per_byte"] == pytest.approx(
                plain["validation"]["bits_per_byte"], abs=1e-6
            )
            mine, theirs = one["tasks"]["ensemble-words"]["ensemble"], plain["tasks"]["ensemble-words"]
            assert mine == pytest.approx(theirs, abs=1e-6)
    assert len({m["loss"] for m in three["members"]}) == 3
    copies = group(2, bodies_tools.evaluate_ensemble, str(runs), "copies", [], [])[0]
    assert losses(copies) == pytest.approx([three["members"][0]["loss"]] * 3, abs=1e-6)
    assert copies["curves"]["logit mean"][2]["gain_interval"] == pytest.approx([0, 0], abs=1e-6)
    turned = group(2, bodies_tools.evaluate_ensemble, str(runs), "turned", [], [])[0]
    for rule in manifest.RULES:
        assert losses(turned, rule) == pytest.approx(losses(three, rule), abs=1e-6)


def test_choices_are_scored_by_the_ensembles_rule(group, runs, task, three) -> None:
    tokenizer = load_tokenizer(runs / "tiny")
    turned = group(2, bodies_tools.evaluate_ensemble, str(runs), "turned", [str(task)], [])[0]
    for found, rule in ((three, "logit mean"), (turned, "probability mean")):
        right, questions = 0, read_questions(task)
        for question in questions:
            scores = []
            for choice in question.choices:
                one = row(tokenizer, question.query, choice, 16)
                some = logits(runs, torch.tensor([one.ids[:-1]]))[:, 0]
                logs = some.mean(0).log_softmax(-1) if rule == "logit mean" else some.softmax(-1).mean(0).log()
                scores.append(sum(float(logs[i - 1, one.ids[i]]) for i in range(one.start, len(one.ids))))
            right += scores.index(max(scores)) == question.gold
        assert found["tasks"]["ensemble-words"]["ensemble"]["accuracy"] == right / len(questions)


def test_more_subsets_than_asked_for_are_a_sample_of_them(group, runs, three) -> None:
    some = group(2, bodies_tools.evaluate_ensemble, str(runs), "three", [], ["--evaluate.sequences=3"], 5)[0]
    assert some["subsets"] == {"evaluated": 5, "of": 7, "seed": 0}
    assert [(p["subsets"], p["of"]) for p in some["curves"]["logit mean"]] == [(3, 3), (1, 3), (1, 1)]
    assert some["text"]["sequences"] == 3


def test_errors_come_from_all_ranks_and_the_verb_works_through_torchrun(group, tiny, runs, three) -> None:
    for answer in group(2, bodies_tools.evaluate_ensemble, str(runs), "three", [], [], 31, "test"):
        assert "has no test split" in answer["error"]
    code, text = finished("ensemble", "evaluate", "three", tiny.runs, "--json")
    assert code == 0, text
    assert json.loads(text) == {key: value for key, value in three.items() if key != "tasks"}
    manifest.write(runs, replace(manifest.read(runs, "three"), name="lost"))
    moved = (runs / "tiny-2").rename(runs / "elsewhere")
    try:
        for answer in group(2, bodies_tools.evaluate_ensemble, str(runs), "lost", [], []):
            assert "member tiny-2 is missing" in answer["error"]
    finally:
        moved.rename(runs / "tiny-2")


def test_members_are_trained_by_one_command(tiny, tmp_path) -> None:
    code, text = finished(
        "ensemble", "train", tiny.yaml, "--members=2", "--at-once=2", "--name=e", f"--runs={tmp_path}", "--train.length=2 steps",
        "--resources.ranks=1", "--evaluate.prompts=[]", "--finish.export=false",
    )  # fmt: skip
    assert code == 0, text
    assert "logit mean of 2" in text
    made = manifest.read(tmp_path, "e")
    assert [(m.run, m.step, m.seed, m.order_seed) for m in made.members] == [("e-0", 2, 0, 0), ("e-1", 2, 1, 1)]
    assert made.vocab_size == made.padded_vocab_size == 301
