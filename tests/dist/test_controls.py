"""Negative controls: with a defect of other implementations put in, the battery's own comparisons fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.dist import bodies_controls as bodies
from tests.dist.test_battery import OPTIONS, assert_same
from trainer.optim import NorMuon, ShardedOptimizer

FP32 = {**OPTIONS, "polar_dtype": "fp32"}
TALL, WIDE = [(21, 12), (20, 12)], [(12, 20), (9, 14)]


def test_the_norm_of_a_shard_instead_of_the_matrix(group) -> None:
    """As in microsoft/dion's NorMuon: half a per cent of the update even on Gaussian matrices. One rank cannot see it."""
    one = group(1, bodies.steps, "normuon", "plain", FP32, 3, torch.float32, TALL)[0]
    alone, sharded = (
        group(world, bodies.defective_steps, "norm of the shard", "normuon", "shard0", FP32, TALL)[0] for world in (1, 3)
    )
    assert all((one[name] - alone[name]).abs().max() < 1e-5 for name in one)  # the same rule, otherwise
    with pytest.raises(AssertionError, match="w0"):
        assert_same("normuon", one, sharded)
    for name in ("w0", "w1"):
        moved = one[name] - bodies.tensor(int(name[1]), tuple(one[name].shape))
        assert (one[name] - sharded[name]).norm() > 0.002 * moved.norm()  # rounding does 1e-6


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_padded_rows_that_are_counted(rule, group) -> None:
    """Nothing where the rows divide by the ranks; elsewhere the scale is that of another shape."""
    one = group(1, bodies.steps, rule, "plain", FP32, 3, torch.float32, TALL)[0]
    even, uneven = (group(world, bodies.defective_steps, "padded rows", rule, "shard0", FP32, [TALL[0]])[0] for world in (3, 4))
    assert_same(rule, {name: value for name, value in one.items() if name.startswith("w0")}, even)
    with pytest.raises(AssertionError, match="w0"):
        assert_same(rule, {name: value for name, value in one.items() if name.startswith("w0")}, uneven)


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_a_lone_matrix_in_two_dimensions(rule, group) -> None:
    """Two matrices are a batch on one rank, and each alone on its owner of two."""
    shapes = [(5, 7), (5, 7)]
    for defect, equal in (("batches", True), ("two dimensions", False)):
        one, other = (group(world, bodies.defective_steps, defect, rule, "shard0", FP32, shapes)[0] for world in (1, 2))
        assert all((one[name] - other[name]).abs().max() < 1e-5 for name in one)
        if equal:
            assert_same(rule, one, other)
        else:
            with pytest.raises(AssertionError, match="w[01]"):
                assert_same(rule, one, other)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_gram_matrix_summed_in_bf16(world, group) -> None:
    """The same code in fp32 keeps the bound of the kernel's tests."""
    exact, rounded = (group(world, bodies.error_by_summed_gram, (64, 24), d)[0] for d in (torch.float32, torch.bfloat16))
    assert exact < 2e-5
    assert rounded > 50 * 2e-5


@pytest.mark.parametrize("load, equal", [(ShardedOptimizer.load_state_dict, True), (torch.optim.Optimizer.load_state_dict, False)])
def test_a_state_cast_by_torchs_own_loader(load: Callable[..., None], equal: bool) -> None:
    """It casts everything but `step` to the dtype of the parameter."""

    def train(weight: Tensor, optimizer: NorMuon, steps: range) -> dict[str, Tensor]:
        for step in steps:
            weight.grad = bodies.tensor(step, (20, 12), torch.bfloat16)
            optimizer.step()
        return {"w": weight.detach().clone(), **{f"w.{key}": value for key, value in optimizer.state[weight].items()}}

    calm, first, second = (nn.Parameter(bodies.tensor(0, (20, 12), torch.bfloat16)) for _ in range(3))
    undisturbed = train(calm, NorMuon([calm], lr=0.1), range(1, 7))
    saved = NorMuon([first], lr=0.1)
    train(first, saved, range(1, 4))
    resumed = NorMuon([second], lr=0.1)
    load(resumed, saved.state_dict())
    second.data.copy_(first.data)
    after = train(second, resumed, range(4, 7))
    assert {value.dtype for name, value in after.items() if name != "w"} == {torch.float32 if equal else torch.bfloat16}
    if equal:
        assert_same("normuon", undisturbed, after)
    else:
        with pytest.raises(AssertionError):
            assert_same("normuon", undisturbed, {name: value.to(undisturbed[name].dtype) for name, value in after.items()})
