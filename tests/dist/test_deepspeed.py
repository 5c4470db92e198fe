"""DeepSpeed's ZeRO trains what FSDP2 trains, and saves and resumes our checkpoints."""

from __future__ import annotations

import pytest

from tests.dist import bodies_run, bodies_strategies, strategies
from tests.dist.strategies import STRATEGIES, ZERO
from tests.dist.test_run import NAN, place, resumed  # noqa: F401  (place is a fixture)

pytestmark = pytest.mark.skipif(strategies.ABSENT, reason=strategies.REASON)

ADAMW = (
    "--optim={name: adamw, lr: 0.01, weight_decay: 0.1}",
    "--checkpoint.every=100 steps",
    "--schedule.name=constant",
)
SHORT = (*ADAMW, "--train.length=12 steps")


@pytest.fixture(scope="module")
def fsdp2(group, place):  # noqa: F811
    """Twenty steps of AdamW under FSDP2, two micro-steps each."""
    return group(2, bodies_run.train, str(place / "run.yaml"), ["--name=fsdp2", *ADAMW, "--train.length=20 steps"])[0]


@pytest.mark.parametrize("strategy", ZERO)
def test_losses_and_norms_are_those_of_fsdp2(group, place, fsdp2, strategy) -> None:  # noqa: F811
    world, override = ZERO[strategy]
    name = f"parity-{strategies.file_name(strategy)}"
    run = resumed(group, place, name, [(world, None)], *ADAMW, "--train.length=20 steps", override)[0]
    assert run["outcome"] == "finished"
    assert len(run["loss"]) == 20
    assert run["loss"] == pytest.approx(fsdp2["loss"], rel=1e-5)
    for mine, reference in zip(run["history"], fsdp2["history"], strict=True):
        for key in {"gradient_norm", "validation_loss"} & reference.keys():
            assert mine[key] == pytest.approx(reference[key], rel=1e-4)
        assert mine.keys() == reference.keys()
        for label, figures in reference.get("groups", {}).items():
            assert mine["groups"][label].keys() == figures.keys()
            for key, figure in figures.items():
                found = mine["groups"][label][key]
                assert found == (figure if figure is None else pytest.approx(figure, rel=1e-3)), (label, key)
    assert [r["step"] for r in run["history"] if "groups" in r] == [5, 10, 15, 20]
    assert run["tensors"].keys() == fsdp2["tensors"].keys()


def test_saves_share_one_mesh(group, place) -> None:  # noqa: F811
    """A mesh for each save, or for each tensor, would keep its process groups to the end of the run."""
    overrides = ["--name=meshes", *ADAMW, "--train.length=3 steps", "--checkpoint.every=1 steps"]
    overrides.append(ZERO["deepspeed, stage: 2"][1])
    assert group(2, bodies_strategies.meshes_of, str(place / "run.yaml"), overrides) == [1, 1]


@pytest.mark.parametrize("strategy", [name for name in strategies.RESUMED if name in ZERO])
def test_resume_is_bit_equal(group, place, strategy) -> None:  # noqa: F811
    world, override = ZERO[strategy]
    name = f"bits-{strategies.file_name(strategy)}"
    whole = resumed(group, place, name, [(world, None)], *SHORT, override)[0]
    parts = resumed(group, place, f"{name}-stopped", [(world, 5), (world, None)], *SHORT, override)
    assert (parts[0]["step"], parts[1]["started"]) == (5, 5)
    assert parts[1]["loaded"] == parts[0]["tensors"]
    assert parts[1]["tensors"] == whole["tensors"]
    assert parts[1]["history"] == whole["history"]


def test_a_run_moves_to_zero_and_back(group, place, fsdp2) -> None:  # noqa: F811
    last = None
    for world, stop, name in strategies.ZERO_CHAIN:
        attempt = resumed(group, place, "moves", [(world, stop)], *SHORT, STRATEGIES[name][1])[0]
        assert "error" not in attempt, attempt
        if last is not None:
            assert attempt["loaded"] == last["tensors"]
        last = attempt
    assert last["outcome"] == "finished"
    assert last["loss"] == pytest.approx(fsdp2["loss"][:12], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_nan_on_one_rank_is_applied_by_none(group, place, stage) -> None:  # noqa: F811
    name = f"nan{stage}"
    results = group(
        2,
        bodies_run.train,
        str(place / "run.yaml"),
        [f"--name={name}", *SHORT, ZERO[f"deepspeed, stage: {stage}"][1]],
        6,
        NAN.format(step=4),
    )
    assert [r["skipped"] for r in results] == [[[24, 8]]] * 2
    assert results[0]["history"][4]["loss"] is not None  # and the step after it is sound
