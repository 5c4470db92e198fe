"""The battery: what every rule in `trainer/optim` must keep. A new file enters by itself."""

from __future__ import annotations

import pytest
import torch

from tests.dist import bodies_optim as bodies
from trainer.optim.plan import Stored, own, traffic
from trainer.optim.sharded import orthogonalizes
from trainer.registry import alternatives

RULES = sorted(alternatives("trainer.optim"))
MATRIX_RULES = [name for name in RULES if orthogonalizes(alternatives("trainer.optim")[name])]
OPTIONS = {"lr": 0.1, "weight_decay": 0.2}
LAYOUTS = [
    (2, "shard0"), (3, "shard0"), (4, "shard0"), (7, "shard0"), (2, "shard1"), (3, "shard1"), (2, "replicate"),
    (3, "replicate"), (4, "hsdp"), (4, "hsdp-spread"),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(group):
    """The steps of a rule on one rank, once for all tests."""
    known = {}

    def run(rule: str, **options):
        key = (rule, *sorted(options.items()))
        if key not in known:
            known[key] = group(1, bodies.steps, rule, "plain", {**OPTIONS, **options})[0]
        return known[key]

    return run


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_float64_reference(rule, group) -> None:
    module = alternatives("trainer.optim")[rule]
    options = OPTIONS | ({"polar_dtype": "fp64"} if rule in MATRIX_RULES else {})
    result = group(1, bodies.steps, rule, "plain", options, 3, torch.float64)[0]
    _, optimizer = bodies.build(rule, "plain", options, torch.float64)
    group_options = optimizer.param_groups[0]
    for i, shape in enumerate(bodies.SHAPES):
        matrices = shape[0] if len(shape) == 3 else 1
        for e in range(matrices):
            pick = (lambda t: t[e]) if len(shape) == 3 else (lambda t: t)  # noqa: B023
            weight = pick(bodies.tensor(i, shape, torch.float64))
            state = {k: torch.zeros_like(pick(v) if v.ndim else v) for k, v in optimizer.state[group_options["params"][i]].items()}
            for step in (1, 2, 3):
                gradient = pick(bodies.tensor(1000 * step + i, shape, torch.float64))
                weight, state = module.reference(weight, gradient, state, group_options)
            assert (pick(result[f"w{i}"]) - weight).abs().max() < 1e-9, shape
            for key, value in state.items():
                mine = result[f"w{i}.{key}"]
                assert ((pick(mine) if mine.ndim else mine) - value).abs().max() < 1e-9, (shape, key)


@pytest.mark.parametrize("world, layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_update_does_not_depend_on_the_layout(rule, world, layout, group, alone) -> None:
    one, many = alone(rule), group(world, bodies.steps, rule, layout, OPTIONS)
    for other in many:
        assert one.keys() == other.keys()
        for name, value in one.items():
            if rule in MATRIX_RULES:
                assert torch.equal(value, other[name]), name
            else:  # torch's fused kernel treats a shard's tail by other instructions
                assert (value - other[name]).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize("change", [{"polar_dtype": "bf16"}, {"nesterov": True, "cautious": True}, {"polar_dtype": "fp32", "polar_form": "gram"}])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_options_do_not_change_that(rule, change, group, alone) -> None:
    one = alone(rule, **change)
    for world, layout in ((2, "shard0"), (3, "shard1"), (4, "hsdp-spread")):
        other = group(world, bodies.steps, rule, layout, {**OPTIONS, **change})[0]
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (3, "shard0"), (2, "shard1"), (4, "hsdp-spread")])
def test_normuon_along_the_longer_axis(world, layout, group, alone) -> None:
    options = {"axis": "longer", "restore": "norm", "scale": "spectral"}
    one, other = alone("normuon", **options), group(world, bodies.steps, "normuon", layout, {**OPTIONS, **options})[0]
    assert one["w0.mean_square"].shape == (20, 1)
    assert one["w1.mean_square"].shape == (1, 20)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_missing_on_one_rank_is_zeros(rule, group) -> None:
    assert all(group(3, bodies.missing_gradient_on_one_rank, rule))


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_bytes_are_those_of_the_unpadded_optimum(rule, world, group) -> None:
    shapes = [(336, 128), (128, 336), (126, 126), (336, 128), (97, 64)]
    stored = [Stored((1, *shape), 1) for shape in shapes]
    plan = traffic(stored, own(stored, world), world, 2)
    for (sent, received), (formula_sent, formula_received) in zip(group(world, bodies.bytes_sent, rule, shapes), plan, strict=True):
        assert formula_sent <= sent <= 1.05 * formula_sent
        assert formula_received <= received <= 1.05 * formula_received


@pytest.mark.parametrize("rule", MATRIX_RULES)
@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (3, "shard0"), (2, "shard1"), (4, "hsdp")])
def test_a_split_weight_is_three_weights(rule, world, layout, group) -> None:
    together = group(world, bodies.split_or_apart, rule, layout, True)[0]
    apart = group(1, bodies.split_or_apart, rule, "plain", False)[0]
    assert (together - apart).abs().max() < 1e-12


def test_ranks_with_other_parameters_are_refused_on_all(group) -> None:
    assert all("different parameters" in message for message in group(2, bodies.disagree))


def test_a_matrix_with_a_nan_stays_and_is_counted(group) -> None:
    assert group(3, bodies.non_finite) == [(1, True, True)] * 3
