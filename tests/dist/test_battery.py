"""The battery: what every rule in `trainer/optim` must keep. A new file enters by itself."""

from __future__ import annotations

import re

import pytest
import torch

from tests.dist import bodies_optim as bodies
from trainer.optim.plan import Stored, own, traffic
from trainer.optim.sharded import orthogonalizes
from trainer.optim.sides import words
from trainer.registry import alternatives

RULES = sorted(alternatives("trainer.optim"))
MATRIX_RULES = [name for name in RULES if orthogonalizes(alternatives("trainer.optim")[name])]
WHOLE_RULES = [name for name in MATRIX_RULES if hasattr(alternatives("trainer.optim")[name].Options, "polar_dtype")]
"""Those that ask for whole matrices: equal to the bit on any number of ranks. The others add up over shards."""
LOW_RANK_RULES = [name for name in MATRIX_RULES if hasattr(alternatives("trainer.optim")[name].Options, "rank")]
OPTIONS = {"lr": 0.1, "weight_decay": 0.2}
LAYOUTS = [
    (2, "shard0"), (3, "shard0"), (4, "shard0"), (7, "shard0"), (2, "shard1"), (3, "shard1"), (2, "replicate"),
    (3, "replicate"), (3, "ddp"), (4, "hsdp0"), (4, "hsdp0-spread"), (4, "hsdp1-spread"),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(group):
    """The steps of a rule on one rank, once for all tests."""
    known = {}

    def run(rule: str, *, dtype: torch.dtype = torch.float32, shapes=bodies.SHAPES, **options):
        key = repr((rule, dtype, shapes, sorted(options.items())))
        if key not in known:
            known[key] = group(1, bodies.steps, rule, "plain", {**OPTIONS, **options}, 3, dtype, shapes)[0]
        return known[key]

    return run


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_float64_reference(rule, group) -> None:
    module = alternatives("trainer.optim")[rule]
    options = OPTIONS | ({"polar_dtype": "fp64"} if rule in WHOLE_RULES else {})
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
        assert_same(rule, one, other)


# Whole matrices lie on one rank under Shard(0), their rows are cut under Shard(1), their columns under Shard(2).
EXPERTS = [(4, 6, 10), (3, 10, 6), (1, 7, 5), (5, 3, 3), (5, 3, 3)]


@pytest.mark.parametrize("world, layout", [(2, "shard0"), (3, "shard0"), (3, "shard1"), (4, "shard1"), (2, "shard2"), (7, "shard2"), (4, "hsdp0"), (4, "hsdp1-spread")])
@pytest.mark.parametrize("rule", RULES)
def test_three_dimensional_parameters_too(rule, world, layout, group, alone) -> None:
    one, other = alone(rule, shapes=EXPERTS), group(world, bodies.steps, rule, layout, OPTIONS, 3, torch.float32, EXPERTS)[0]
    assert_same(rule, one, other)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_whole_experts_cost_no_exchange(rule, group) -> None:
    assert group(3, bodies.calls_of_a_step, rule, "shard0", EXPERTS) == [0] * 3
    assert min(group(3, bodies.calls_of_a_step, rule, "shard1", EXPERTS)) > 0


def fused_shapes(rule: str) -> list[tuple[int, ...]]:
    """Shapes to be cut into blocks of 8, 4 and 6 rows; low-rank rules want all of them tall, or all wide."""
    return [(18, 10), (18, 3), (2, 18, 4)] if rule in LOW_RANK_RULES else [(18, 10), (18, 7), (2, 18, 6)]


@pytest.mark.parametrize("blocks", [[], [8, 4, 6]])
@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (3, "shard0"), (3, "shard1"), (4, "hsdp0-spread"), (4, "hsdp1")])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_weights_stored_as_inputs_by_outputs_are_seen_transposed(rule, world, layout, blocks, group, alone) -> None:
    shapes = fused_shapes(rule)
    one = alone(rule, shapes=shapes, blocks=blocks)
    options = {**OPTIONS, "blocks": blocks, "transposed": True}
    other = group(world, bodies.steps, rule, layout, options, 3, torch.float32, shapes)[0]
    assert_same(rule, one, {name: value.mT if value.ndim > 1 else value for name, value in other.items()})  # state lies as the parameter does
    as_stored = alone(rule, shapes=[(10, 18)], blocks=[])["w0"]
    assert as_stored.shape == other["w0"].shape
    assert not torch.equal(as_stored, other["w0"])


@pytest.mark.parametrize("world, layout", [(2, "shard0"), (3, "shard0"), (3, "shard1"), (4, "hsdp0-spread")])
@pytest.mark.parametrize("rule", RULES)
def test_bf16_parameters_keep_fp32_state_and_the_same_steps(rule, world, layout, group, alone) -> None:
    one, other = alone(rule, dtype=torch.bfloat16), group(world, bodies.steps, rule, layout, OPTIONS, 3, torch.bfloat16)[0]
    for name, value in one.items():
        wanted = torch.float32 if "." in name else torch.bfloat16
        assert value.dtype == other[name].dtype == (wanted if value.is_floating_point() else torch.int64), name
    assert_same(rule, one, other, 2.0**-7)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_repeats_to_the_bit(rule, group) -> None:
    """T16, AdamW included."""
    first, second = (group(3, bodies.steps, rule, "shard0", OPTIONS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("shape", [(12, 20), (7, 9)])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_any_number_of_matrices_over_the_ranks(rule, shape, group, alone) -> None:
    """T18: fewer than ranks, all residues. A matrix moves the same in whatever company."""
    one = alone(rule, shapes=[shape] * 9)
    counts = list(range(1, 10))
    for count, other in zip(counts, group(4, bodies.alike, rule, OPTIONS, counts, shape)[0], strict=True):
        assert sum("." not in name for name in other) == count
        assert_same(rule, {name: one[name] for name in other}, other)


@pytest.mark.parametrize("world, layout", [(3, "shard0"), (4, "hsdp0-spread"), (3, "ddp")])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_all_ranks_have_the_same_plan(rule, world, layout, group) -> None:
    """T21. Each rank is a process of its own, with hashes of its own."""
    plans = group(world, bodies.plan_of, rule, layout)
    assert set(plans) == {plans[0]}
    owners = {int(owner) for owner in re.findall(r"owner=(\d+)", plans[0])}
    assert owners == set(range(world))


def assert_same(rule: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    """Bit-equal for a rule of whole matrices, and for whole numbers; else to rounding: kernels treat the tail of a shard by
    other instructions, and sums over shards have another order."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if rule in WHOLE_RULES or not value.is_floating_point():
            assert torch.equal(value, other[name]), name
        else:
            most = (bound if value.dtype == torch.bfloat16 else 1e-6) * value.abs().max()
            assert (value - other[name]).abs().max() <= most, name


@pytest.mark.parametrize("change", [{"polar_dtype": "bf16"}, {"nesterov": True, "cautious": True}, {"polar_dtype": "fp32", "polar_form": "gram"}])
@pytest.mark.parametrize("rule", WHOLE_RULES)
def test_options_do_not_change_that(rule, change, group, alone) -> None:
    one = alone(rule, **change)
    for world, layout in ((2, "shard0"), (3, "shard1"), (4, "hsdp0-spread")):
        other = group(world, bodies.steps, rule, layout, {**OPTIONS, **change})[0]
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (3, "shard0"), (2, "shard1"), (4, "hsdp0-spread")])
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
@pytest.mark.parametrize("rule", WHOLE_RULES)
def test_bytes_are_those_of_the_unpadded_optimum(rule, world, group) -> None:
    shapes = [(336, 128), (128, 336), (126, 126), (336, 128), (97, 64)]
    stored = [Stored((1, *shape), 1) for shape in shapes]
    plan = traffic(stored, own(stored, world), world, 2)
    measured = group(world, bodies.bytes_sent, rule, shapes, {"polar_dtype": "bf16"})
    for (sent, received, added), (formula_sent, formula_received) in zip(measured, plan, strict=True):
        assert formula_sent <= sent <= 1.05 * formula_sent
        assert formula_received <= received <= 1.05 * formula_received
        assert added == 0


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("rank", [8, 60])  # below and above the rows of a shard of a wide weight
@pytest.mark.parametrize("rule", LOW_RANK_RULES)
def test_bytes_are_those_of_the_turn_and_of_the_sums(rule, rank, world, group) -> None:
    """l s_p + l min(s_p, r) words of fp32 for wide weights, nothing for tall ones; and the sums that the rule names."""
    shapes = [(336, 128), (128, 336), (126, 126), (64, 97)]
    turns = [words(Stored((1, *shape), 1), shape[0] < shape[1], rank, world) for shape in shapes]
    known = alternatives("trainer.optim")[rule]
    sums = sum(known.reduced(shape, {"rank": rank, "blocks": [], "refresh": 1}) for shape in shapes)
    measured = group(world, bodies.bytes_sent, rule, shapes, {"rank": rank})
    for part, (sent, received, added) in enumerate(measured):
        formula_sent, formula_received = (4 * sum(turn[part][way] for turn in turns) for way in (0, 1))
        assert 0 < formula_sent <= sent <= 1.05 * formula_sent
        assert 0 < formula_received <= received <= 1.05 * formula_received
        assert added == sums


@pytest.mark.parametrize("rule", MATRIX_RULES)
@pytest.mark.parametrize("world, layout", [(1, "plain"), (2, "shard0"), (3, "shard0"), (2, "shard1"), (4, "hsdp0")])
def test_a_split_weight_is_three_weights(rule, world, layout, group) -> None:
    together = group(world, bodies.split_or_apart, rule, layout, True)[0]
    apart = group(1, bodies.split_or_apart, rule, "plain", False)[0]
    assert (together - apart).abs().max() < 1e-12


@pytest.mark.parametrize("about", ["parameters", "rates", "buckets"])
@pytest.mark.parametrize("rule", RULES)
def test_ranks_with_other_parameters_are_refused_on_all(rule, about, group) -> None:
    assert all("different parameters" in message for message in group(2, bodies.disagree, rule, about))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [rule for rule in MATRIX_RULES if rule != "dct_adamw"])
def test_a_matrix_with_a_value_that_is_not_finite_stays_and_is_counted(rule, value, group) -> None:
    assert group(3, bodies.non_finite, rule, value) == [(1, True, True)] * 3
