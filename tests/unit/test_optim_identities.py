"""What the rules must be equal to: each other, older algorithms, themselves on other views of the same matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.optim import Muon, NorMuon, ShardedOptimizer, muon, normuon
from trainer.optim.polar import reference
from trainer.optim.sharded import orthogonalizes
from trainer.registry import alternatives

RULES = sorted(alternatives("trainer.optim"))
MATRIX_RULES = [name for name in RULES if orthogonalizes(alternatives("trainer.optim")[name])]


def having(*options: str) -> list[str]:
    """The matrix rules with these options."""
    return [
        name
        for name in MATRIX_RULES
        if all(hasattr(alternatives("trainer.optim")[name].Options, option) for option in options)
    ]


WHOLE_RULES, LOW_RANK_RULES = having("polar_dtype"), having("rank")


def precise(rule: str, dtype: str = "fp64") -> dict[str, Any]:
    """Options that make a rule's products exact to that."""
    return {"polar_dtype": dtype} if rule in WHOLE_RULES else {}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(rule: str, start: Tensor, gradients: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and its state after some steps."""
    weight = nn.Parameter(start.clone())
    optimizer = ShardedOptimizer([{"rule": rule, "params": [weight], **options}])
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert optimizer.take_rejected() == 0
    return weight.detach(), dict(optimizer.state[weight])


def exact(u: Tensor, *_: object) -> Tensor:
    """The polar factor itself."""
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (20, 12)])
def test_normuon_of_exact_factors_is_muon_unless_the_matrix_is_tall(shape, monkeypatch) -> None:
    """T6. The rows of an exact factor with no more rows than columns all have norm 1: nothing to normalize."""
    start, gradients = draw(0, *shape), [draw(1 + i, *shape) for i in range(4)]
    options = {"lr": 0.1, "polar_dtype": "fp64", "weight_decay": 0.1}
    with_tables = [run(rule, start, gradients, **options)[0] for rule in ("muon", "normuon")]
    assert (with_tables[0] - with_tables[1]).abs().max() > 1e-4  # else the equality below would say little
    monkeypatch.setattr(muon, "polar", exact)
    monkeypatch.setattr(normuon, "polar", exact)
    one, other = (run(rule, start, gradients, **options)[0] for rule in ("muon", "normuon"))
    difference = (one - other).abs().max()
    assert difference < 1e-12 if shape[0] <= shape[1] else difference > 1e-3


@pytest.mark.parametrize("polar", ["simple", "polar-express", "8+2"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16), (1, 9), (3, 6, 10)])
def test_every_update_of_normuon_has_the_root_mean_square_it_promises(shape, polar) -> None:
    """T7. 0.2 lr whatever the table makes of the singular values; with `restore: norm` it is the table's."""
    options = {"lr": 0.1, "polar_dtype": "fp64", "polar": polar}
    for count in (1, 2, 3):
        gradients = [draw(10 + i, *shape) for i in range(count)]
        before, after = (run("normuon", draw(0, *shape), gradients[:n], **options)[0] for n in (count - 1, count))
        assert (after - before).square().mean((-2, -1)).sqrt().numpy() == pytest.approx(0.02, rel=1e-12)
    first = run("normuon", torch.zeros(shape, dtype=torch.float64), gradients[:1], **options, restore="norm")[0]
    expected = reference(gradients[0], polar).square().sum((-2, -1)).sqrt() * 0.02 / min(shape[-2:]) ** 0.5
    assert torch.allclose(first.square().mean((-2, -1)).sqrt(), expected, rtol=1e-10)


def test_all_rows_move_alike_in_the_first_step_of_a_tall_matrix() -> None:
    """T8."""
    gradient = draw(1, 40, 12) * torch.logspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)  # rows of all sizes
    norms = {
        rule: run(rule, torch.zeros(40, 12).double(), [gradient], lr=0.1, polar_dtype="fp64")[0].norm(dim=1)
        for rule in ("muon", "normuon")
    }
    assert norms["normuon"].max() / norms["normuon"].min() < 1 + 1e-5
    assert norms["muon"].max() / norms["muon"].min() > 3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", having("nesterov"))
def test_heavy_ball_momentum_gives_the_same_updates(rule, nesterov, monkeypatch) -> None:
    """T9. M <- b M + G is the average times 1 / (1 - b), which orthogonalization does not see."""
    start, gradients = draw(0, 20, 12), [draw(1 + i, 20, 12) for i in range(5)]
    options = {"lr": 0.1, "nesterov": nesterov, **precise(rule)}
    if rule == "root":
        options["quantile"] = 1.0  # a threshold is rounded up by a thousandth of its binary exponent
    ours, state = run(rule, start, gradients, **options)

    def heavy_ball(momentum: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for m, g in zip(momentum, gradients, strict=True):
            m.mul_(group["momentum"]).add_(g)
        return [g + group["momentum"] * m for m, g in zip(momentum, gradients, strict=True)] if nesterov else momentum

    monkeypatch.setattr(alternatives("trainer.optim")[rule].matrix, "advance", heavy_ball)
    theirs, other = run(rule, start, gradients, **options)
    assert (ours - theirs).abs().max() < 1e-12
    assert torch.allclose(other["momentum"] * 0.05, state["momentum"], atol=1e-12)
    monkeypatch.undo()
    assert (ours - run(rule, start, gradients, **options | {"nesterov": not nesterov})[0]).abs().max() > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torchs_up_to_bf16(nesterov) -> None:
    ours, theirs = (nn.Parameter(draw(0, 64, 40, dtype=torch.float32)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "nesterov": nesterov}
    mine = Muon([ours], polar="simple", polar_dtype="bf16", **settings)
    reference = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(4):
        before = ours.detach().clone()
        ours.grad, theirs.grad = (draw(1 + step, 64, 40, dtype=torch.float32) for _ in range(2))
        mine.step()
        reference.step()
        update = (ours.detach() - before).norm()
        assert (ours - theirs).norm() < 0.05 * (step + 1) * update  # two bf16 iterations differ by this much


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_of_zero_moves_no_weight_and_all_state(rule) -> None:
    """T12; and so a sweep over the decay is flat at a rate of 0 (oracle 19 of infinite compute)."""
    start, gradients = draw(0, 20, 12).float(), [draw(1 + i, 20, 12).float() for i in range(3)]
    still, state = run(rule, start, gradients, lr=0.0, weight_decay=0.3)
    _, moved = run(rule, start, gradients, lr=0.1, weight_decay=0.3)
    assert torch.equal(still, start)
    assert torch.equal(run(rule, start, gradients, lr=0.0, weight_decay=12.8)[0], start)
    for key, value in moved.items():  # no rule's state depends on the weights
        assert value.any()
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("rule", RULES)
def test_without_gradients_decay_is_an_exact_multiplication(rule) -> None:
    """T12, with the base rate whatever the scale of the update."""
    start = draw(0, 20, 12).float()
    changes = [{}] if rule not in having("scale") else [{"scale": s} for s in ("rms", "spectral", "shape")]
    for change in changes:
        weight, _ = run(rule, start, [torch.zeros(20, 12)] * 3, lr=0.1, weight_decay=0.3, **change)
        expected = start.clone()
        for _ in range(3):
            expected *= 1 - 0.1 * 0.3
        assert torch.equal(weight, expected)
    if rule in having("cautious"):  # no update has the sign of a weight
        assert torch.equal(run(rule, start, [torch.zeros(20, 12)], lr=0.1, weight_decay=0.3, cautious=True)[0], start)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_heads_of_one_weight_are_a_batch_of_matrices(rule) -> None:
    """T14. Equal blocks of rows, a 3-D parameter, and separate parameters are one and the same: to the bit, but for the
    low-rank rules, whose blocks lie beside each other in the factors."""
    heads, start = 4, draw(0, 4, 6, 20).float()
    gradients = [draw(1 + i, 4, 6, 20).float() for i in range(3)]
    options = {"lr": 0.1, "weight_decay": 0.1}
    stacked, state = run(rule, start, gradients, **options)
    fused, flat = run(rule, start.flatten(0, 1), [g.flatten(0, 1) for g in gradients], **options, blocks=[6] * heads)
    apart = [run(rule, start[head], [g[head] for g in gradients], **options)[0] for head in range(heads)]
    if rule in LOW_RANK_RULES:
        for one in (fused.view(4, 6, 20), torch.stack(apart)):
            assert torch.allclose(one, stacked, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(fused.view(4, 6, 20), stacked)
        assert torch.equal(torch.stack(apart), stacked)
        for key, value in state.items():
            assert torch.equal(flat[key].view_as(value), value), key
    whole = run(rule, start.flatten(0, 1), [g.flatten(0, 1) for g in gradients], **options)[0]
    assert (whole - fused).abs().max() > 1e-3  # one matrix of 24 rows is something else


@pytest.mark.parametrize("rule", RULES)
def test_a_step_of_bf16_weights_is_that_of_fp32_rounded_once(rule) -> None:
    """A decay of 1e-4 alone is below the rounding of bf16; together with the update it is not lost."""
    options = {"rule": rule, "lr": 1e-2, "weight_decay": 1e-2, **precise(rule, "fp32")}
    narrow = nn.Parameter(draw(0, 20, 12).bfloat16())
    wide = nn.Parameter(narrow.detach().float())
    optimizers = [ShardedOptimizer([{**options, "params": [weight]}]) for weight in (narrow, wide)]
    for step in range(4):
        narrow.grad = draw(1 + step, 20, 12).bfloat16()
        wide.grad = narrow.grad.float()
        wide.data.copy_(narrow)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(narrow, wide.bfloat16())
        assert all(torch.equal(optimizers[0].state[narrow][k], v) for k, v in optimizers[1].state[wide].items())
    assert all(v.dtype == torch.float32 for v in optimizers[0].state[narrow].values() if v.is_floating_point())


def test_the_mean_squares_of_bf16_weights_do_not_stall() -> None:
    """With beta2 0.95 a bf16 average of 1.0 never moves toward 1.05."""
    gradient = draw(1, 20, 12)
    expected = reference(gradient[None])[0].square().mean(1, keepdim=True)
    weight = nn.Parameter(draw(0, 20, 12).bfloat16())
    optimizer = NorMuon([weight], lr=0.01, polar_dtype="fp32")
    stalled = torch.zeros(20, 1, dtype=torch.bfloat16)
    for _ in range(150):
        weight.grad = gradient.bfloat16()
        optimizer.step()
        stalled.lerp_(expected.bfloat16(), 0.05)
    value = optimizer.state[weight]["mean_square"]
    assert value.dtype == optimizer.state[weight]["momentum"].dtype == torch.float32
    assert (value / expected - 1).abs().max() < 0.01  # bf16 gradients, and 0.95^150 to go
    assert (stalled.double() / expected - 1).abs().min() > 0.03
