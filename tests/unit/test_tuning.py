"""Tuning over a stand-in of torchrun, whose runs have known losses: what is started, found again, refused and certified."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch import cli, pipeline
from launch.backends import torchrun
from launch.tuning import Search, tune
from launch.tuning_cells import Space
from tests.unit.test_lattice import bowl
from trainer import config as configuration
from trainer import runfolder
from trainer.outcome import Outcome, RunError, write_outcome

ROOT = Path(__file__).parents[2]
BEST = (8.0, 3e-3, 1.6)
SPACE = Space(epochs=(4.0, 8.0), lr=(1e-3, 3e-3), decay=(0.8, 1.6))
START = (4.0, 1e-3, 0.8)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.0)
    return configuration.load(ROOT / "configs/quickstart.yaml", ["--name=t", f"--runs={tmp_path}/runs"])


@pytest.fixture
def backend(monkeypatch) -> dict:
    """torchrun with runs that are over at once: with the loss of their point, or as `fate` says."""
    facts: dict = {"started": [], "fate": {}, "loss": bowl(*BEST)}

    def submit(config, folder, options, *, resume, after=()):
        facts["started"].append(folder.name)
        point = (float(config.train.length.split()[0]), config.optim.lr, config.optim.weight_decay)
        outcome = facts["fate"].get(folder.name, Outcome.FINISHED)
        with open(folder / "metrics.jsonl", "a") as history:
            history.write(
                json.dumps({"step": 5, "validation_loss": -1.0}) + "\n" + json.dumps({"step": 9, "loss": 0.1}) + "\n"
            )
            if outcome is Outcome.FINISHED:
                history.write(json.dumps({"step": 9, "validation_loss": facts["loss"](point)}) + "\n")
        runfolder.record_event(folder, "planned", attempt=1, steps=9, ranks=1)
        runfolder.record_event(folder, "data", sources={"data": {"sequences": 320}})
        return {"pid": 1, "started": 1, "host": "h"}

    def state(folder, handle):
        logs = folder / f"logs/{handle['attempts'] + 1}"
        if not logs.exists():
            logs.mkdir()
            outcome = facts["fate"].get(folder.name, Outcome.FINISHED)
            write_outcome(logs, outcome, f"{folder.name} ended", asked=True)
        return "ended", ""

    monkeypatch.setattr(torchrun, "submit", submit)
    monkeypatch.setattr(torchrun, "state", state)
    return facts


def tuned(config, **changes):
    search = Search(config=config, space=SPACE, **{"start": START, **changes})
    return tune(search, "torchrun", torchrun.Options(), 4)


def test_a_search_certifies_the_optimum_and_a_second_one_starts_nothing(config, backend) -> None:
    found = tuned(config)
    assert found.certified
    assert found.code == 0
    assert found.point["run"] == "t-e8-lr0.003-wd1.6"
    assert found.point["loss"] == bowl(*BEST)(BEST), "of the last step, not of one before"
    assert [n["run"] for n in found.neighbours if not n["edge"]] == [
        "t-e4-lr0.003-wd1.6", "t-e16-lr0.003-wd1.6", "t-e8-lr0.001-wd1.6", "t-e8-lr0.009-wd1.6", "t-e8-lr0.003-wd0.8",
        "t-e8-lr0.003-wd3.2",
    ]  # fmt: skip
    assert len(backend["started"]) == len(set(backend["started"])) == len(found.cells)
    per_epoch = 320 / (config.train.tokens_per_step // config.data.sequence_length)
    assert found.point["tau_epochs"] == pytest.approx(1 / (3e-3 * 1.6 * per_epoch))
    kept = json.loads((Path(config.runs) / "tunings/t/certificate.json").read_text())
    assert (
        kept["point"]["digest"]
        == json.loads((config.folder.parent / found.point["run"] / "run.json").read_text())["lineage"]["digest"]
    )
    again, before = tuned(config), list(backend["started"])
    assert again == found
    assert backend["started"] == before


def test_a_cell_is_its_run_with_the_ratio_of_the_rates_kept(config) -> None:
    cell = SPACE.cell(config, (4.0, 1e-3, 0.8))
    assert (cell.train.length, cell.optim.lr, cell.optim.weight_decay) == ("4 epochs", 1e-3, 0.8)
    assert cell.optim.adamw.lr / cell.optim.lr == pytest.approx(config.optim.adamw.lr / config.optim.lr)
    assert cell.optim.adamw.weight_decay == config.optim.adamw.weight_decay
    headed = replace(config, optim=replace(config.optim, adamw=replace(config.optim.adamw, decay_head=True)))
    assert SPACE.cell(headed, (4.0, 1e-3, 0.8)).optim.adamw.weight_decay == 0.8
    timed = replace(SPACE, decay=(0.3, 0.6), decay_key="tau_epochs").cell(config, (4.0, 1e-3, 0.3))
    assert (timed.optim.tau_epochs, timed.optim.weight_decay, timed.name) == (0.3, 0.0, "t-e4-lr0.001-tau0.3")


def test_epochs_are_those_of_the_source_that_the_file_counts_by(config) -> None:
    counted = replace(config, train=replace(config.train, length="1 epochs of web"))
    assert SPACE.cell(counted, START).train.length == "4 epochs of web"
    mixed = configuration.load(
        ROOT / "configs/quickstart.yaml",
        ["--data.path=null", "--data.validation_fraction=0.02", "--train.length=9 steps", "--data.mixture={a: {path: stdlib, weight: 0.5}, b: {path: stdlib, weight: 0.5}}"],
    )  # fmt: skip
    with pytest.raises(RunError, match="the sources of a mixture end at different steps"):
        SPACE.axes(mixed)


def test_the_start_has_a_timescale_near_three_tenths_of_an_epoch(config) -> None:
    space = replace(SPACE, lr=(1e-3, 3e-3, 1e-2), decay=(0.1, 0.2, 0.4, 0.8, 1.6, 3.2))
    told: list[str] = []
    assert space.start(config, None, told.append) == (4.0, 3e-3, 0.4)
    assert "starts in the middle" in told[0]
    per_step = config.train.tokens_per_step
    known = replace(config, data=replace(config.data, subset_tokens=800 * per_step))
    assert space.start(known, None) == (4.0, 3e-3, 1.6), "1 / (0.003 * 800 * 1.6) = 0.26; 0.8 has 0.52"
    paper = replace(
        known,
        data=replace(config.data, subset_tokens=209_715_200, sequence_length=4096),
        train=replace(config.train, tokens_per_step=262_144),
    )
    assert replace(space, epochs=(8.0, 16.0, 32.0)).start(paper, None) == (16.0, 3e-3, 1.6), (
        "the paper's 300M at 200M tokens"
    )
    with pytest.raises(RunError, match="epochs 5 is no value of the lattice"):
        space.start(config, (5.0, 3e-3, 0.4))


def test_a_diverged_cell_refuses_the_certificate_and_is_not_tried_again(config, backend) -> None:
    sick = "t-e8-lr0.009-wd1.6"
    backend["fate"][sick] = Outcome.DIVERGED
    found = tuned(config)
    assert (found.certified, found.missing, found.code) == (False, [sick], 65)
    assert found.point["run"] == "t-e8-lr0.003-wd1.6"
    assert next(cell for cell in found.cells if cell["run"] == sick)["state"] == "diverged"
    before = list(backend["started"])
    assert tuned(config) == found
    assert backend["started"] == before


def test_a_loss_that_is_no_number_is_none(config, backend) -> None:
    sick = (8.0, 9e-3, 1.6)
    backend["loss"] = lambda point: math.nan if point == sick else bowl(*BEST)(point)
    found = tuned(config)
    assert (found.certified, found.missing) == (False, ["t-e8-lr0.009-wd1.6"])
    json.loads((Path(config.runs) / "tunings/t/certificate.json").read_text(), parse_constant=pytest.fail)


def test_a_validation_before_the_last_step_is_no_loss(config, backend) -> None:
    best = tuned(config).point["run"]
    history = config.folder.parent / best / "metrics.jsonl"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:-1]))
    found = tuned(config)
    assert not found.certified
    assert next(cell for cell in found.cells if cell["run"] == best)["loss"] is None


def test_what_broke_ends_the_search_and_the_same_command_goes_on(config, backend) -> None:
    backend["fate"]["t-e8-lr0.001-wd0.8"] = Outcome.INFRASTRUCTURE
    found = tuned(config)
    assert (found.certified, found.code) == (False, 69)
    assert found.stopped.startswith("1 of 4 runs failed")
    del backend["fate"]["t-e8-lr0.001-wd0.8"]
    assert tuned(config).certified
    assert backend["started"].count("t-e8-lr0.001-wd0.8") == 2
    assert backend["started"].count("t-e4-lr0.001-wd0.8") == 1


def test_a_budget_ends_with_a_sentence_and_goes_on_later(config, backend) -> None:
    codes = []
    for _ in range(9):
        before = len(backend["started"])
        found = tuned(config, most_runs=3)
        codes.append(found.code)
        assert len(backend["started"]) - before <= 3
        if found.certified:
            break
        assert "--most-runs = 3 runs were started" in found.stopped
    assert codes == [75] * (len(codes) - 1) + [0]
    assert len(set(backend["started"])) == len(backend["started"]) == len(found.cells)


def test_a_run_that_is_no_cell_is_refused_before_anything_starts(config, backend) -> None:
    tuned(config)
    before = list(backend["started"])
    with pytest.raises(RunError, match="made from other inputs"):
        tuned(replace(config, seed=7))
    folder = config.folder.parent / "t-e4-lr0.001-wd0.8"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("length: 4 epochs", "length: 5 epochs"))
    with pytest.raises(RunError, match="was resumed with other settings"):
        tuned(config)
    assert backend["started"] == before


WRONG = [
    (["--epochs", "0.5"], "--epochs 0.5 is not 1 or more"), (["--lr", "0"], "--lr 0 is not above zero"),
    (["--weight-decay", "1", "1.0"], "--weight-decay names a value twice"), (["--noise=-1"], "--noise is -1.0"),
    (["--most-runs", "0"], "--most-runs is 0"), (["--method=grid", "--start", "4", "1e-3", "0.4"], "a grid has no start"),
    (["--tau-epochs", "0.3", "--weight-decay", "1"], "both set the decay"), (["--data.max_epochs=2"], "above data.max_epochs = 2"),
    (["--optim.lr=0"], "optim.lr is 0"), (["--train.lenght=1 steps"], "unknown key train.lenght"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options_are_told(tmp_path, options, words) -> None:
    with pytest.raises(RunError) as error:
        cli.dispatch(["tune", str(ROOT / "configs/quickstart.yaml"), f"--runs={tmp_path}/runs", "--dry-run", *options])
    assert words in str(error.value)
    assert error.value.outcome.code == 78
    assert os.listdir(tmp_path) == []


def test_the_verb_prints_cells_costs_and_the_certificate(config, backend, capsys) -> None:
    command = [
        "tune", str(ROOT / "configs/quickstart.yaml"), "--name=t", f"--runs={config.runs}", "--epochs", "4", "8", "--lr", "1e-3",
        "3e-3", "--weight-decay", "0.8", "1.6", "--start", "4", "1e-3", "0.8", "--data.subset_tokens=51200",
    ]  # fmt: skip
    assert cli.dispatch([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "t-e4-lr0.001-wd0.8: 4 epochs, lr 0.001, weight decay 0.8, tau" in shown
    assert "4 runs, 20 epochs, 1,024,000 tokens" in shown
    assert not config.folder.parent.exists()
    assert cli.dispatch(command) == 0
    shown = capsys.readouterr().out
    assert next(line for line in shown.splitlines() if line.startswith("*")).endswith("t-e8-lr0.003-wd1.6")
    assert "certified: none of its 6 neighbours is better" in shown
    assert cli.dispatch([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is True
