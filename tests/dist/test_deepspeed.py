"""DeepSpeed's ZeRO trains what FSDP2 trains, and saves and resumes our checkpoints."""

from __future__ import annotations

import importlib.util

import pytest

from tests.dist import bodies_run
from tests.dist.test_run import place, resumed  # noqa: F401  (place is a fixture)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra is absent: pip install 'orthogon[deepspeed]'"
)

ADAMW = ("--optim={name: adamw, lr: 0.01, weight_decay: 0.1}", "--checkpoint.every=100 steps", "--schedule.name=constant")
SHORT = (*ADAMW, "--train.length=12 steps")


def zero(stage: int, **more: bool) -> str:
    return f"--parallel={{name: deepspeed, stage: {stage}{''.join(f', {k}: true' for k in more)}}}"


@pytest.fixture(scope="module")
def fsdp2(group, place):  # noqa: F811
    """Twenty steps of AdamW under FSDP2, two micro-steps each."""
    return group(2, bodies_run.train, str(place / "run.yaml"), ["--name=fsdp2", *ADAMW, "--train.length=20 steps"])[0]


@pytest.mark.parametrize(
    "strategy",
    [zero(1), zero(2), zero(3), zero(2, offload_optimizer=True), zero(3, offload_optimizer=True, offload_parameters=True)],
)
def test_losses_and_norms_are_those_of_fsdp2(group, place, fsdp2, strategy) -> None:  # noqa: F811
    name = "p" + "".join(c for c in strategy if c.isalnum())
    run = resumed(group, place, name, [(2, None)], *ADAMW, "--train.length=20 steps", strategy)[0]
    assert run["outcome"] == "finished"
    assert len(run["loss"]) == 20
    assert run["loss"] == pytest.approx(fsdp2["loss"], rel=1e-5)
    for mine, reference in zip(run["history"], fsdp2["history"], strict=True):
        for key in {"gradient_norm", "validation_loss"} & reference.keys():
            assert mine[key] == pytest.approx(reference[key], rel=1e-4)
    assert run["tensors"].keys() == fsdp2["tensors"].keys()


@pytest.mark.parametrize("strategy", [zero(1), zero(2, offload_optimizer=True), zero(3)])
def test_resume_is_bit_equal(group, place, strategy) -> None:  # noqa: F811
    name = "b" + "".join(c for c in strategy if c.isalnum())
    whole = resumed(group, place, name, [(2, None)], *SHORT, strategy)[0]
    parts = resumed(group, place, f"{name}-stopped", [(2, 5), (2, None)], *SHORT, strategy)
    assert (parts[0]["step"], parts[1]["started"]) == (5, 5)
    assert parts[1]["loaded"] == parts[0]["tensors"]
    assert parts[1]["tensors"] == whole["tensors"]
    assert parts[1]["history"] == whole["history"]


def test_a_run_moves_to_zero_and_back(group, place, fsdp2) -> None:  # noqa: F811
    last = None
    stops = [(2, 3, "--parallel={name: fsdp2}"), (2, 5, zero(2)), (3, 7, zero(3)), (2, 9, zero(1)), (3, None, "--parallel={name: ddp}")]
    for world, stop, strategy in stops:
        attempt = resumed(group, place, "moves", [(world, stop)], *SHORT, strategy)[0]
        assert "error" not in attempt, attempt
        if last is not None:
            assert attempt["loaded"] == last["tensors"]
        last = attempt
    assert last["outcome"] == "finished"
    assert last["loss"] == pytest.approx(fsdp2["loss"][:12], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_nan_on_one_rank_is_applied_by_none(group, place, stage) -> None:  # noqa: F811
    name = f"nan{stage}"
    results = group(2, bodies_run.train, str(place / "run.yaml"), [f"--name={name}", *SHORT, zero(stage)], 6, 4)
    assert [r["skipped"] for r in results] == [[[24, 8]]] * 2
    assert results[0]["history"][4]["loss"] is not None  # and the step after it is sound


def test_bf16(group, place, fsdp2) -> None:  # noqa: F811
    losses = resumed(group, place, "bf16", [(2, None)], *SHORT, zero(3), "--train.precision=bf16")[0]["loss"]
    assert losses != fsdp2["loss"][:12]
    assert losses[-1] == pytest.approx(fsdp2["loss"][11], abs=0.1)
