"""Every strategy: the same gradients, the same checkpoint, resume from one to another; what does not fit is refused."""

from __future__ import annotations

import pytest

from tests.dist import bodies, bodies_run, bodies_strategies, strategies
from tests.dist.strategies import TORCH
from tests.dist.test_run import NAN, place, resumed  # noqa: F401  (place is a fixture)
from trainer.parallel import ddp, fsdp2

SINGLE, DDP, HSDP = ((TORCH[name][1],) for name in ("single", "ddp", "fsdp2, replicate: 2"))
SHORT = ("--train.length=9 steps", "--checkpoint.every=100 steps")


@pytest.fixture(scope="module")
def calm(group, place):  # noqa: F811
    """Nine steps on two ranks under FSDP2."""
    return group(2, bodies_run.train, str(place / "run.yaml"), ["--name=calm", *SHORT])[0]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ddp.Options()),
        (3, ddp.Options()),
        (2, fsdp2.Options(sync_every_micro_step=True)),
        (4, fsdp2.Options(replicate=2, sync_every_micro_step=True)),
        (4, fsdp2.Options(replicate=2, sync_every_micro_step=False)),
        (3, fsdp2.Options(replicate=3)),
    ],
)
def test_gradients_are_sums_over_all_micro_steps_and_ranks(group, world, options) -> None:
    """Against one process that takes all rows at once, in float64; also the norm, to which every gradient counts once."""
    reference = group(1, bodies.loss_and_gradients, 1, 12)[0]
    for accumulation in (1, 2):
        for loss, norm, gradients in group(world, bodies.loss_and_gradients, accumulation, 12, options):
            assert loss == pytest.approx(reference[0], rel=1e-12)
            assert norm == pytest.approx(reference[1], rel=1e-10)
            for name, gradient in reference[2].items():
                assert (gradients[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, fsdp2.Options()),
        (2, fsdp2.Options(sync_every_micro_step=False, reshard_after_forward=False)),
        (4, fsdp2.Options(replicate=2)),
    ],
)
def test_overlapping_on_a_cpu_changes_no_bit(group, world, options, accumulation) -> None:
    assert all(group(world, bodies_strategies.overlap_changes_nothing, options, accumulation))


def test_one_run_moves_through_all_strategies(group, place, calm) -> None:  # noqa: F811
    """Every attempt starts from exactly the tensors that the one before it saved, state of the matrix rule included."""
    last, losses = None, None
    for world, stop, name in strategies.CHAIN:
        attempt = resumed(group, place, "moves", [(world, stop)], *SHORT, TORCH[name][1])[0]
        assert "error" not in attempt
        if last is not None:
            assert attempt["loaded"] == last["tensors"]
        last, losses = attempt, attempt["loss"]
    assert last["outcome"] == "finished"
    assert any(name.endswith("mean_square") for name in last["tensors"])
    assert losses == pytest.approx(calm["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", [name for name in strategies.RESUMED if name in TORCH])
def test_resume_is_bit_equal(group, place, strategy) -> None:  # noqa: F811
    world, override = TORCH[strategy]
    name = f"bits-{strategies.file_name(strategy)}"
    whole = resumed(group, place, name, [(world, None)], *SHORT, override)[0]
    parts = resumed(group, place, f"{name}-stopped", [(world, 5), (world, None)], *SHORT, override)
    assert (parts[0]["step"], parts[1]["started"]) == (5, 5)
    assert parts[1]["tensors"] == whole["tensors"]
    assert parts[1]["history"] == whole["history"]


def test_replicas_that_divide_the_work_change_nothing(group, place) -> None:  # noqa: F811
    repeated, spread = (
        resumed(group, place, name, [(4, None)], *SHORT, "--train.length=3 steps", *HSDP, *extra)[0]
        for name, extra in (("repeat", ()), ("spread", ("--parallel.spread_replicas=true",)))
    )
    assert repeated["tensors"] == spread["tensors"]


def test_each_replica_orthogonalizes_its_share(group) -> None:
    """Under DDP no matrix is orthogonalized twice, under HSDP each replica does all unless told otherwise."""
    assert sum(group(3, bodies_strategies.own_matrices, ddp.Options())) == 14
    assert sum(group(4, bodies_strategies.own_matrices, fsdp2.Options(replicate=2))) == 28
    assert sum(group(4, bodies_strategies.own_matrices, fsdp2.Options(replicate=2, spread_replicas=True))) == 14


def test_a_nan_on_one_rank_of_replicas_is_applied_by_none(group, place) -> None:  # noqa: F811
    results = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=nan-ddp", *SHORT, *DDP], None, NAN.format(step=3))
    assert [r["skipped"] for r in results] == [[[16, 8]]] * 2
    assert results[0]["tensors"] == results[1]["tensors"]


@pytest.mark.parametrize(
    ("world", "strategy", "words"),
    [
        (2, SINGLE, "parallel.name is single and there are 2 ranks"),
        (3, HSDP, "parallel.replicate = 2 does not divide 3 ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_data_is_prepared(group, place, world, strategy, words) -> None:  # noqa: F811
    folder = f"--data.folder={place}/never"
    text = resumed(group, place, f"refused{world}", [(world, None)], *SHORT, *strategy, folder)[0]["error"]
    assert words in text
    assert "mend:" in text
    assert not (place / "never").exists()


def test_a_missing_compiler_is_told_before_data_is_prepared(group, place) -> None:  # noqa: F811
    overrides = ["--name=uncompiled", *SHORT, f"--data.folder={place}/never"]
    for text in group(2, bodies_strategies.without_a_compiler, str(place / "run.yaml"), overrides):
        assert "train.compile needs a C++ compiler" in text
        assert "mend:" in text
    assert not (place / "never").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("about", "what", "where"),
    [
        ("configuration", "about the configuration: optim.weight_decay is 0.0 on rank 0 and 0.2 on rank 1", "optim.weight_decay"),
        ("rates", "about this step: learning rates is [", "learning rates"),
        ("gradients", "about this step: parameters without a gradient is [] on rank 0 and ['model.", "without a gradient"),
    ],
)
def test_ranks_that_disagree_end_all_with_one_sentence(group, place, strategy, about, what, where) -> None:  # noqa: F811
    """No rank hangs, none goes on."""
    overrides = [f"--name=odd-{about}-{strategy}", *SHORT, TORCH[strategy][1]]
    texts = group(2, bodies_strategies.disagreeing, str(place / "run.yaml"), overrides, about, timeout=60.0)
    assert texts[0] == texts[1]
    assert what in texts[0]
    assert where in texts[0]
    assert "mend:" in texts[0]


def test_one_rank_under_ddp_is_fine(group, place, calm) -> None:  # noqa: F811
    losses = resumed(group, place, "alone", [(1, None)], *SHORT, "--train.length=3 steps", *DDP)[0]["loss"]
    assert losses[:2] == pytest.approx(calm["loss"][:2], rel=1e-5)
