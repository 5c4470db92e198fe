"""ROOT: its threshold, its identities, and the defects of released code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.optimizer_tables import gaussian_spectrum
from trainer.optim import ROOT, Muon
from trainer.optim.polar import Schedule, polar, squares, unsound
from trainer.optim.root import clipped, threshold
from trainer.optim.root_tables import FITTED, PUBLISHED, SAFETY, for_shape

GROUP = {"clip": "always", "quantile": 0.9, "outlier": 6.0}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after(kind: type, gradient: torch.Tensor, **options: object) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = kind([weight], lr=1.0, polar_dtype="fp32", **options)
    weight.grad = gradient.clone()
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.999])
def test_the_threshold_is_the_quantile_to_a_thousandth(q, size) -> None:
    u = noise(3, 40, 50)
    exact = u.abs().flatten(1).sort().values[:, math.ceil(q * 2000) - 1]
    ratio = threshold(u * size, q).flatten() / size / exact
    assert (ratio > 1 - 1e-6).all()
    assert (ratio < 1.001).all()


def test_one_outlier_does_not_coarsen_the_threshold() -> None:
    """A histogram of equal bins up to the largest entry would be off by its width: here 100 / 2048 at least."""
    u = noise(1, 64, 64)
    before = threshold(u, 0.9)
    u[0, 0, 0] = 1e4
    assert (threshold(u, 0.9) / before - 1).abs() < 2e-3


def test_clipping_is_the_momentum_less_its_soft_threshold() -> None:
    """T10."""
    u = noise(2, 30, 20)
    t = threshold(u, 0.9)
    soft = u.sign() * (u.abs() - t).clamp_min(0)
    assert (clipped(u, GROUP) - (u - soft)).abs().max() < 1e-6
    assert not torch.equal(clipped(u, GROUP), u)


def test_without_clipping_it_is_muon() -> None:
    """T10, with the coefficients of Muon."""
    gradient = noise(24, 40)
    assert torch.equal(after(ROOT, gradient, quantile=1.0, polar="simple"), after(Muon, gradient, polar="simple"))
    assert not torch.equal(after(ROOT, gradient, quantile=0.9, polar="simple"), after(Muon, gradient, polar="simple"))
    assert not torch.equal(after(ROOT, gradient, quantile=1.0), after(Muon, gradient))  # fitted ones are others


def test_of_two_matrices_only_the_one_with_outliers_is_clipped() -> None:
    u = noise(2, 64, 64)
    u[1, 3, 5] = 60.0
    result = clipped(u, {**GROUP, "clip": "outliers"})
    assert torch.equal(result[0], u[0])
    assert result[1].abs().max() < 2


@pytest.mark.parametrize("clip", ["always", "outliers"])
def test_zeros_stay_zeros(clip) -> None:
    assert not after(ROOT, torch.zeros(6, 9), clip=clip).any()


def test_more_entries_than_torch_quantile_takes() -> None:
    """torch.quantile, as released code calls it, refuses more than 2^24."""
    u = noise(1, 4100, 4100)
    with pytest.raises(RuntimeError, match="too large"):
        u.flatten().quantile(0.9)
    assert threshold(u, 0.9).item() == pytest.approx(1.645, rel=2e-3)


def test_a_shape_without_published_coefficients_is_refused() -> None:
    """Released code falls back to Muon's triple with a warning."""
    with pytest.raises(ValueError, match="no coefficients for 24 x 40, only for 2048 x 2048.*use polar: fitted"):
        ROOT([torch.nn.Parameter(noise(24, 40))], polar="published")
    for (short, long), triple in PUBLISHED.items():
        assert for_shape("published", long, short) == (1.0, (triple,) * 5)


def left(schedule: Schedule, sigma: np.ndarray) -> float:
    """Mean of (f(sigma) - 1)^2 over singular values."""
    safety, steps = schedule
    sigma = sigma / (safety * np.sqrt(np.sum(sigma**2)))
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return float(np.mean((sigma - 1) ** 2))


@pytest.mark.parametrize("shape", PUBLISHED)
def test_fitted_coefficients_are_better_than_the_published_ones_on_all_their_shapes(shape) -> None:
    """T30: on Gaussian matrices, and on a power law, where small slopes at zero fail."""
    for sigma in (gaussian_spectrum(*shape), np.arange(1.0, 1025.0) ** -1):
        assert left(for_shape("fitted", *shape), sigma) < left(for_shape("published", *shape), sigma)


def test_the_nearest_aspect_ratio_is_taken() -> None:
    for rows, columns, aspect in ((100, 100, 1.0), (140, 100, 1.5), (100, 272, 2.0), (3000, 1000, 4.0), (1, 900, 8.0)):
        assert for_shape("fitted", rows, columns)[1] is FITTED[aspect]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aspect", FITTED)
def test_half_precision_blows_up_no_small_matrix_and_none_of_rank_one(aspect, dtype) -> None:
    """Their largest singular value is nearly their norm; at a safety of 1.02 one 1 x 9 matrix in six was rejected."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (1, 3), (1, 9), (1, 64), (2, 2), (3, 10)):
        x = torch.randn(4000, rows, columns, generator=generator)
        o = polar(x, (SAFETY, FITTED[aspect]), dtype)
        assert not unsound(squares(o, -1).sum(dim=(-2, -1)), o.shape).any(), (rows, columns)
    x = torch.randn(40, 64, 1, generator=generator) @ torch.randn(40, 1, 48, generator=generator)
    assert torch.linalg.matrix_norm(polar(x, (SAFETY, FITTED[aspect]), dtype).float(), ord=2).max() < 1.2


@pytest.mark.parametrize("swell", [1.0, 1.01])
@pytest.mark.parametrize("aspect", FITTED)
def test_fitted_coefficients_keep_their_bounds(aspect, swell) -> None:
    """A slope at zero of Muon's triple or more; no matrix of rank one blows up or turns round, rounded to bf16 or not, even where
    its norm is taken for 4.9% less than it is."""
    value, high = np.linspace(1e-4, 1.049, 100_000) / SAFETY, 0.0
    for a, b, c in FITTED[aspect]:
        value = swell * (a * value + b * value**3 + c * value**5)
        high = max(high, float(np.abs(value).max()))
    assert math.prod(a for a, _, _ in FITTED[aspect]) / SAFETY >= 480
    assert value.min() > 0
    assert value[1000:].min() > 0.4
    assert value.max() < 1.2
    assert high < 2.0


@pytest.mark.parametrize(("option", "message"), [
    ({"quantile": 0.0}, "quantile is 0.0; use"), ({"quantile": 1.5}, "quantile is 1.5; use"),
    ({"quantile": float("nan")}, "quantile is nan"), ({"outlier": 0.5}, "outlier is 0.5; use 1 or more"),
    ({"clip": "soft"}, "clip 'soft' is unknown"),
])  # fmt: skip
def test_bad_options_are_named(option, message) -> None:
    with pytest.raises(ValueError, match=message):
        ROOT([torch.nn.Parameter(noise(4, 5))], **option)
