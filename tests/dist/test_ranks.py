"""The same on any number of ranks: initial weights, updates, losses, gradients, decisions."""

from __future__ import annotations

import pytest
import torch

from tests.dist import bodies

WORLDS = (1, 2, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_bit_identical_on_1_2_3_ranks(group, tied) -> None:
    states = [group(world, bodies.initial_state, 0, tied)[0] for world in WORLDS]
    assert states[0] == states[1] == states[2]
    other = group(1, bodies.initial_state, 1, tied)[0]
    changed = {key for key in other if other[key] != states[0][key]}
    assert {key for key in other if "norm" not in key} == changed  # another seed moves every drawn weight


@pytest.mark.parametrize("options", [{"polar_dtype": "fp32"}, {"polar_dtype": "bf16"}, {"nesterov": True, "weight_decay": 0.1}])
def test_normuon_is_bit_equal_on_1_2_3_ranks(group, options) -> None:
    one, *others = (group(world, bodies.optimizer_steps, "normuon", 3, options)[0] for world in WORLDS)
    matrices = {name.removesuffix(".momentum") for name in one if name.endswith(".momentum")}
    assert len(matrices) == 14
    for other in others:
        assert one.keys() == other.keys()
        for name, value in one.items():
            if any(name.startswith(matrix) for matrix in matrices):
                assert torch.equal(value, other[name]), name
            else:
                assert_near(value, other[name])


def test_adamw_agrees_on_1_2_3_ranks(group) -> None:
    """To rounding only: torch's fused kernel treats the last few elements of a shard by other instructions."""
    one, *others = (group(world, bodies.optimizer_steps, "adamw", 3, {"weight_decay": 0.1})[0] for world in WORLDS)
    for other in others:
        for name, value in one.items():
            assert_near(value, other[name])


def assert_near(value: torch.Tensor, other: torch.Tensor) -> None:
    assert (value - other).abs().max() <= 1e-6 * value.abs().max()


def test_loss_and_gradients_do_not_depend_on_the_split(group) -> None:
    """(1 x 8), (2 x 4), (8 x 1), and uneven 3 ranks with masked rows, in float64."""
    reference = group(1, bodies.loss_and_gradients, 1, 8)[0]
    for world, accumulation in ((1, 8), (2, 4), (2, 1), (3, 2)):
        loss, norm, gradients = group(world, bodies.loss_and_gradients, accumulation, 8)[0]
        assert loss == pytest.approx(reference[0], rel=1e-12)
        assert norm == pytest.approx(reference[1], rel=1e-10)
        for name, gradient in reference[2].items():
            assert gradient.dtype == torch.float64
            assert (gradients[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max().clamp_min(1e-3), name


def test_what_one_rank_sees_all_ranks_act_on(group) -> None:
    expected = [
        (True, "", False), (False, "", False), (False, "", False),
        (True, "a signal came", False), (True, "train.time_limit is reached", False), (True, "", True),
    ]  # fmt: skip
    assert group(3, bodies.verdicts) == [expected] * 3


def test_a_save_is_complete_when_it_is_on_all_ranks(group) -> None:
    assert group(3, bodies.complete) == [[False, False, True]] * 3


def test_an_error_of_one_rank_is_raised_on_all(group) -> None:
    assert group(3, bodies.decide_together) == [("last", "first")] * 3


def test_fully_masked_rows_add_exactly_zero(group) -> None:
    assert group(2, bodies.validation_sum, 2) == [0.0, 0.0]
