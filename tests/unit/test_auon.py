"""AuON and Hybrid-AuON: what their formulas come to, the brake that acts, sick matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.optim import AuON, HybridAuON, auon
from trainer.optim.polar import COEFFICIENTS, reference


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after(kind: type, gradient: Tensor, **options: object) -> Tensor:
    """The first step from zero weights, at a rate of -1: the update."""
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = kind([weight], lr=1.0, momentum=0.0, **options)
    weight.grad = gradient.clone()
    optimizer.step()
    assert optimizer.take_rejected() == 0
    return -weight.detach()


def test_the_papers_form_is_momentum_over_its_norm() -> None:
    """T11, for 10^5 entries and more; whatever the size of a gradient."""
    g = noise(400, 256)
    update = after(AuON, g)
    assert (update - g / g.norm()).abs().max() < 1e-5 * (g / g.norm()).abs().max()
    for size in (1e-30, 1e30):
        assert torch.allclose(after(AuON, g * size), update, rtol=1e-5, atol=0)
    small = after(AuON, noise(2, 3).double())  # not so for six entries
    assert small.norm() < 0.95


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("side", [440, 1100])  # of 440 x 440 entries and more (1,065 x 1,065) the cosh is known before
def test_without_a_pass_for_the_cosh_an_update_is_that_of_the_formula(mode, side, monkeypatch) -> None:
    passes = []
    monkeypatch.setattr(auon.torch, "sinh", lambda x, sinh=torch.sinh: passes.append(x.shape) or sinh(x))
    for outlier in (0.0, 1e9):  # many small entries; in effect a single one, the worst case
        g = noise(side, side)
        g[3, 5] += outlier
        exact = auon.reference_update(g.double(), mode)
        assert (after(AuON, g, mode=mode) - exact).norm() < 1.1e-6 * exact.norm()
    assert len(passes) == (2 if (side, mode) == (440, "released") else 0)


def test_the_released_form_is_momentum() -> None:
    g = noise(400, 256)
    assert torch.allclose(after(AuON, g, mode="released"), g, rtol=2e-5)


def test_entries_of_root_mean_square_one_make_the_brake_act() -> None:
    g = noise(400, 256)
    update = after(AuON, g, mode="unit-rms")
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)
    g[3, 5] = 30.0
    braked = after(AuON, g, mode="unit-rms")
    assert braked[0].norm() < 1e-6 * update[0].norm()
    g[3, 5] = 1e4  # cosh^2 leaves fp32 and float64
    assert after(AuON, g, mode="unit-rms").abs().max() < 1e-30
    assert after(AuON, g)[0].norm() > 0  # the paper's form has no brake


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_hybrid_is_so_many_newton_schulz_steps(steps, mode) -> None:
    """T11: NS_k(M) over rms(cosh), which is 1 to 1e-3 for 32 x 48 entries."""
    g = noise(32, 48).double()
    expected = reference(g, (1.0, COEFFICIENTS["simple"][1][:steps]))
    update = after(HybridAuON, g, steps=steps, mode=mode, polar_dtype="fp64")
    brake = (1.5 * expected / expected.norm() if mode == "released" else expected).cosh().square().mean().sqrt()
    assert torch.allclose(update, expected / brake, rtol=1e-9, atol=1e-12)


def test_hybrid_with_a_brake_moves_by_as_much_as_the_others() -> None:
    update = after(HybridAuON, noise(128, 128), mode="unit-rms", polar_dtype="fp32")
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("polar", COEFFICIENTS)
def test_a_schedule_that_is_cut_short_is_no_sickness(polar) -> None:
    """Its singular values go up to 2. `after` counts no rejected matrix."""
    for steps in range(1, len(COEFFICIENTS[polar][1]) + 1):
        for g in (noise(24, 128), torch.linalg.qr(noise(7, 7))[0]):
            assert after(HybridAuON, g, polar=polar, steps=steps, polar_dtype="fp32").any()


@pytest.mark.parametrize("mode", ["paper", "released", "unit-rms"])
@pytest.mark.parametrize("kind", [AuON, HybridAuON])
def test_zeros_stay_and_a_nan_is_counted(kind, mode) -> None:
    assert not after(kind, torch.zeros(6, 9), mode=mode).any()
    weights = [torch.nn.Parameter(noise(6, 9)) for _ in range(2)]
    before = [w.detach().clone() for w in weights]
    optimizer = kind(weights, lr=0.1, mode=mode)
    for weight in weights:
        weight.grad = noise(6, 9, seed=1)
    weights[0].grad[2, 3] = math.nan  # type: ignore[index]
    optimizer.step()
    assert optimizer.take_rejected() == 1
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])


@pytest.mark.parametrize(("kind", "options", "message"), [
    (AuON, {"mode": "normal"}, "mode 'normal' is unknown to auon; use one of paper, released, unit-rms"),
    (HybridAuON, {"steps": 0}, "steps is 0, and simple has 5; give 1 to that"),
    (HybridAuON, {"steps": 6}, "steps is 6, and simple has 5; give 1 to that"),
])  # fmt: skip
def test_bad_options_are_named(kind, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind([torch.nn.Parameter(noise(4, 5))], **options)
