"""State: round trips, torch's own functions, and what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from trainer.optim import NorMuon, ShardedOptimizer

State = dict[str, Any]


def test_state_round_trip_keeps_dtypes_and_continues_bit_equal() -> None:
    def trained(steps: int, weight: nn.Parameter, optimizer: NorMuon, first: int = 0) -> None:
        for step in range(first, first + steps):
            weight.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
            optimizer.step()

    a, b = (nn.Parameter(torch.ones(8, 5)) for _ in range(2))
    one, two = NorMuon([("w", a)], lr=0.1), NorMuon([("w", b)], lr=0.5)
    trained(3, a, one)
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]["lr"] == 0.1
    b.data.copy_(a.data)
    trained(2, a, one, 3), trained(2, b, two, 3)
    assert torch.equal(a, b)


def tensors(good: State, **changes: Tensor | float) -> State:
    """A state with other tensors for its second parameter."""
    return good | {"state": good["state"] | {1: good["state"][1] | changes}}


def group(good: State, **changes: Any) -> State:
    """A state with other values in its group."""
    return good | {"param_groups": [good["param_groups"][0] | changes]}


def torchs(_: State) -> State:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))]).state_dict()


MISFITS: dict[str, Callable[[State], State]] = {
    r"rules \['muon'\], this optimizer has \['normuon'\]": lambda good: group(good, rule="muon"),
    r"rules \['\?'\], this optimizer has \['normuon'\]": torchs,
    r"mean_square of layer\.weight is plain \(7, 1\) float32, not plain \(8, 1\)": lambda good: tensors(
        good, mean_square=torch.ones(8, 1)
    ),
    r"mean_square of layer\.weight is .*, not plain \(7, 1\) bfloat16": lambda good: tensors(
        good, mean_square=torch.ones(7, 1).bfloat16()
    ),
    r"mean_square of layer\.weight is .*, not float": lambda good: tensors(good, mean_square=1.0),
    r"layer\.weight has state .*, not \['age', ": lambda good: tensors(good, age=torch.ones(1)),
    r"layer\.weight has state .*, not \[\]": lambda good: good | {"state": {0: good["state"][0]}},
    r"group normuon has 2 parameters, not 1": lambda good: group(good, params=[0]),
    r"the state at the place of layer\.weight is of other": lambda good: group(good, param_names=["first", "other"]),
    r"blocks of group normuon is \[\], not \[3, 4\]": lambda good: group(good, blocks=[3, 4]),
    r"transposed of group normuon is False, not True": lambda good: group(good, transposed=True),
    r"group normuon has no option secret": lambda good: group(good, secret=1),
}


@pytest.mark.parametrize("words", MISFITS)
def test_a_state_that_does_not_fit_is_refused_whole_and_by_name(words) -> None:
    def build(lr: float) -> ShardedOptimizer:
        shapes = {"first": (8, 5), "layer.weight": (7, 5)}
        named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
        return ShardedOptimizer([{"rule": "normuon", "params": named, "lr": lr}])

    source, target = build(0.3), build(0.1)
    for parameter in source.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    source.step()
    state = MISFITS[words](source.state_dict())
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=words):
        target.load_state_dict(state)
    after = target.state_dict()
    assert after["param_groups"] == before["param_groups"]  # half of a state would be worse than none
    for index, values in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in values.items())


def test_state_travels_through_torchs_own_functions() -> None:
    """DCP calls `load_state_dict` by keyword, and finds states by the names of the model."""

    def build(named: bool) -> tuple[nn.Module, ShardedOptimizer]:
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False))
        rules = {"normuon": ("0.weight", "1.weight"), "adamw": ("0.bias",)}
        parameters = dict(model.named_parameters())
        groups = [
            {"rule": rule, "params": [(n, parameters[n]) if named else parameters[n] for n in names]}
            for rule, names in rules.items()
        ]
        return model, ShardedOptimizer(groups)

    for named, flat in ((False, False), (True, False), (False, True)):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        (model, one), (twin, two) = build(named), build(named)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        one.param_groups[0]["lr"] = 0.125
        one.step()
        state = dcp.get_optimizer_state_dict(model, one, options=options)
        dcp.set_optimizer_state_dict(twin, two, state, options=options)
        assert two.param_groups[0]["lr"] == 0.125
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert one.state[a].keys() == two.state[b].keys()
            for key, value in one.state[a].items():
                assert value.any()
                assert torch.equal(value, two.state[b][key]), (name, key)


def test_torchs_schedulers_drive_it_and_the_first_rate_is_kept() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = NorMuon([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        weight.grad = torch.ones(4, 3)
        optimizer.step()
        schedule.step()
    (group,) = optimizer.hyperparameters()
    assert (group["lr"], group["initial_lr"]) == (0.025, 0.1)
    again = ShardedOptimizer([{**group, "params": [nn.Parameter(torch.ones(4, 3))]}])
    assert again.hyperparameters() == [group]
    assert json.loads(json.dumps(group)) == group
