"""Weight decay, by weight and by time: what decays, how fast, under every strategy; and a real tuning of tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import cli, pipeline
from launch.backends import torchrun
from tests.dist import bodies_decay, bodies_run, strategies
from tests.dist.strategies import ZERO
from trainer import config as configuration
from trainer.outcome import Outcome, write_outcome

RATE, TAU, HEAD_TAU = 0.01, 0.7, 1.5
BY_TIME = (
    f"--optim.tau_epochs={TAU}",
    f"--optim.adamw={{name: adamw, lr: 0.02, decay_head: true, tau_epochs: {HEAD_TAU}}}",
)
SHORT = (
    "--train.length=8 steps",
    "--metrics.groups_every=1 steps",
    "--schedule.name=constant",
    "--evaluate.prompts=[]",
)


def steps_per_epoch(runs: Path, name: str) -> float:
    events = (runs / name / "events.jsonl").read_text().splitlines()
    told = next(event for line in events if (event := json.loads(line))["event"] == "data")
    return told["sources"]["data"]["sequences"] / 8


def test_a_timescale_is_the_weight_decay_it_stands_for_also_through_a_resume(group, tiny) -> None:
    def train(name: str, *options: str, stop_at: int | None = None):
        return group(2, bodies_run.train, tiny.yaml, [f"--name={name}", *SHORT, *options], stop_at)[0]

    by_time = train("by-time", *BY_TIME)
    per_epoch = steps_per_epoch(tiny.place / "runs", "by-time")
    matrices, head = 1 / (RATE * TAU * per_epoch), 1 / (0.02 * HEAD_TAU * per_epoch)
    by_weight = train(
        "by-weight", f"--optim.weight_decay={matrices!r}",
        f"--optim.adamw={{name: adamw, lr: 0.02, decay_head: true, weight_decay: {head!r}}}",
    )  # fmt: skip
    assert by_time["tensors"] == by_weight["tensors"]
    assert by_time["tensors"] != train("no-decay", "--optim.adamw.lr=0.02")["tensors"]
    figures = next(r["groups"] for r in by_time["history"] if r["step"] == 4)
    assert figures["matrices"]["tau_epochs"] == pytest.approx(TAU)
    assert figures["head"]["tau_epochs"] == pytest.approx(HEAD_TAU)
    assert figures["embeddings"]["tau_epochs"] is figures["vectors"]["tau_epochs"] is None
    stopped = train("stopped", *BY_TIME, stop_at=4)
    assert stopped["outcome"] == "preempted"
    resumed = train("stopped", *BY_TIME)
    assert resumed["started"] == stopped["step"]
    assert resumed["tensors"] == by_time["tensors"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("decay_head", [False, True])
def test_what_decays_falls_by_the_product_over_the_schedule_and_the_rest_stays(group, world, decay_head) -> None:
    options = {"name": "adamw", "lr": 0.05, "weight_decay": 3.2, "decay_head": decay_head}
    factors = [0.5, 1.0, 0.25]
    before, after = group(world, bodies_decay.steps_without_gradient, options, factors)[0]
    left = 1.0
    for factor in factors:
        left *= 1 - 0.05 * factor * 3.2
    masked = {name for name, tensor in before.items() if tensor.ndim < 2} | {"model.embed_tokens.weight"}
    masked |= set() if decay_head else {"lm_head.weight"}
    assert sum(name.endswith("bias") for name in masked) == 8
    for name, tensor in before.items():
        expected = tensor.double() * (1.0 if name in masked else left)
        assert (after[name].double() - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_a_head_that_is_the_embedding_cannot_decay(group) -> None:
    options = {"name": "adamw", "decay_head": True}
    found = group(1, bodies_decay.refusal, options, True)[0]
    assert found == "decay_head: the head shares its weights with the embeddings"
    assert group(1, bodies_decay.refusal, options, False)[0] == ""


OTHERS = {
    "ddp": (2, "--parallel={name: ddp}"),
    **({} if strategies.ABSENT else {"deepspeed, stage: 2": ZERO["deepspeed, stage: 2"]}),
}
BOTH = ("--optim={name: adamw, lr: 0.01, tau_epochs: 0.3, decay_head: true}", "--train.length=4 steps", *SHORT[1:])


@pytest.fixture(scope="module")
def reference(group, tiny):
    """Four steps under FSDP2."""
    return group(2, bodies_run.train, tiny.yaml, ["--name=decay-fsdp2", *BOTH])[0]


@pytest.mark.parametrize("strategy", OTHERS)
def test_every_strategy_decays_alike(group, tiny, reference, strategy) -> None:
    world, override = OTHERS[strategy]
    name = f"--name=decay-{strategies.file_name(strategy)}"
    mine = group(world, bodies_run.train, tiny.yaml, [name, *BOTH, override])[0]
    assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert mine["history"][3]["groups"].keys() == {"matrices", "head", "embeddings", "vectors"}
    for label, figures in reference["history"][3]["groups"].items():
        found = mine["history"][3]["groups"][label]
        assert found["weight_rms"] == pytest.approx(figures["weight_rms"], rel=1e-4)
        assert found["tau_epochs"] == (None if label in ("embeddings", "vectors") else pytest.approx(0.3))


@pytest.fixture
def trained(group, tiny, monkeypatch) -> list[str]:
    """torchrun whose runs are trained on warm ranks when they are first asked for; the names of what was started."""
    monkeypatch.setenv("ORTHOGON_STATE", str(tiny.place / "state"))
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.0)
    started: list[str] = []

    def submit(config, folder, options, *, resume, after=()):
        started.append(folder.name)
        return {"pid": 1, "started": 1, "host": "h"}

    def state(folder, handle):
        if not (folder / "logs/1").exists():
            result = group(1, bodies_run.train, str(folder / "config.yaml"), [])[0]
            write_outcome(folder / "logs/1", Outcome(result["outcome"]), result["message"])
        return "ended", ""

    monkeypatch.setattr(torchrun, "submit", submit)
    monkeypatch.setattr(torchrun, "state", state)
    return started


def test_the_verb_tunes_real_runs_and_a_second_time_starts_nothing(tiny, trained, capsys) -> None:
    command = [
        "tune", tiny.yaml, "--name=tuned", "--epochs", "1", "2", "--lr", "3e-4", "3e-3", "--weight-decay", "0.1",
        "--start", "1", "3e-4", "0.1", "--most-epochs=2", "--most-lr=3e-3", "--evaluate.prompts=[]", "--json",
        "--parallel={name: single}", "--data.subset_tokens=512", "--checkpoint.every=99 steps", "--evaluate.every=99 steps",
    ]  # fmt: skip
    assert cli.dispatch(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certified"]
    runs = tiny.place / "runs"
    losses = {}
    for cell in found["cells"]:
        records = [json.loads(line) for line in (runs / cell["run"] / "metrics.jsonl").read_text().splitlines()]
        losses[cell["run"]] = cell["loss"]
        assert cell["loss"] == [r["validation_loss"] for r in records if "validation_loss" in r][-1]
        figures = configuration.load(runs / cell["run"] / "config.yaml").optim
        assert (figures.lr, figures.weight_decay) == (cell["lr"], cell["weight_decay"])
    best = found["point"]
    assert (best["epochs"], best["lr"]) == (2.0, 3e-3), "an untrained model gains by more steps of a larger rate"
    assert all(best["loss"] <= n["loss"] for n in found["neighbours"] if not n["edge"])
    assert best["tau_epochs"] == pytest.approx(1 / (3e-3 * 0.1 * 4)), "512 tokens are 4 steps of 8 sequences of 16"
    assert trained == list(losses)
    before = list(trained)
    assert cli.dispatch(command) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert trained == before
