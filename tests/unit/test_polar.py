"""Newton-Schulz: its polynomial, its symmetries, its bounds, its edges, in every precision and form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.optim import polar as module
from trainer.optim.polar import COEFFICIENTS, polar, reference, unsound

# Relative errors of the products in each precision, on matrices of full rank and moderate conditioning.
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
STEEP = {"cans": 2.5}  # its steps are the steepest: half precision costs it over twice as much as the others
# Most that a singular value becomes, from the polynomials.
OVERSHOOT = {
    "simple": 1.21, "quintic": 1.15, "quintic-4": 1.15, "polar-express": 1.15, "polar-express-8": 1.001, "cans": 1.13,
    "8+2": 1.003,
}  # fmt: skip


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(3, n, n, seed=seed))[0]


def power_law(rows: int, columns: int, power: float) -> Tensor:
    """Singular values i^-power."""
    sigma = torch.arange(1, rows + 1, dtype=torch.float64).pow(-power)
    return rotation(rows, 1) * sigma @ rotation(columns, 2)[:, :rows]


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def bound(name: str, dtype: torch.dtype) -> float:
    return BOUNDS[dtype] * (STEEP.get(name, 1) if dtype.itemsize == 2 else 1)


def given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as it comes to products in `dtype`: never in less than fp32."""
    return x if dtype == torch.float64 else x.float()


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (96, 1000), (1, 33), (33, 1)])
def test_it_is_the_polynomial_of_the_singular_values(name, shape) -> None:
    x = gaussian(3, *shape)
    expected = reference(x, name)
    bounds = {dtype: bound(name, dtype) for dtype in BOUNDS}
    if 1 in shape:  # one singular value, at the steepest place of the table: rounding is amplified by the slope there
        sigma = torch.tensor(1.0 / COEFFICIENTS[name][0], dtype=torch.float64, requires_grad=True)
        value = sigma
        for a, b, c in COEFFICIENTS[name][1]:
            value = a * value + b * value**3 + c * value**5
        value.backward()
        slope = max(1.0, abs(float(sigma.grad) * float(sigma.detach()) / float(value.detach())))
        bounds = {dtype: 8 * slope * torch.finfo(dtype).eps for dtype in BOUNDS if dtype != torch.bfloat16}
    for dtype, most in bounds.items():
        assert error(polar(given(x, dtype), name, dtype), expected) < most, dtype


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_ill_conditioned_matrices_cost_at_most_five_times_the_error(name) -> None:
    x = power_law(64, 256, 1.5)  # singular values down to 2e-3 of the largest
    expected = reference(x, name)
    for dtype in BOUNDS:
        assert error(polar(given(x, dtype), name, dtype), expected) < 5 * bound(name, dtype), dtype


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 96, 200), (3, 200, 96), (2, 1, 9)])
def test_the_prescale_and_the_gram_form_are_the_same_polynomial(shape, form) -> None:
    x = gaussian(*shape, seed=4)
    for name in ("quintic-4", "polar-express"):
        assert (polar(x, name, torch.float64, form, "schatten") - reference(x, name, "schatten")).abs().max() < 1e-12
    assert (polar(torch.zeros(shape), form=form, prescale="schatten") == 0).all()


# Symmetries


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_scale_sign_transpose_and_rotations(name, form) -> None:
    """polar(aX) = polar(X), polar(-X) = -polar(X), polar(X^T) = polar(X)^T, polar(QXZ) = Q polar(X) Z."""
    x, q, z = gaussian(3, 24, 40), rotation(24, 1), rotation(40, 2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        y = given(x, dtype)
        plain = polar(y, name, dtype, form)
        for exponent in (-100, -40, 40, 100):  # a power of two moves no bit
            assert torch.equal(polar(y * 2.0**exponent, name, dtype, form), plain)
        for factor in (1e-12, 1e-3, 3.0, 1e12):
            assert error(polar(y * factor, name, dtype, form), plain.double()) < tolerance
        assert torch.equal(polar(-y, name, dtype, form), -plain)
        assert error(polar(y.mT, name, dtype, form), plain.double().mT) < tolerance
        turned = polar((q @ x @ z).to(dtype), name, dtype, form)
        assert error(turned, q @ plain.double() @ z) < tolerance


def test_an_epsilon_beside_the_norm_would_break_the_scale(monkeypatch) -> None:
    """What the comparison above guards against: X / (||X|| + 1e-7), as in other implementations."""
    x = gaussian(3, 24, 40)
    x, plain = 1e-8 * x / x.norm(), polar(x, dtype=torch.float64)
    assert error(polar(x, dtype=torch.float64), plain) < 1e-12
    monkeypatch.setattr(
        module, "normalize", lambda x, safety, dtype: x / (safety * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    )
    assert error(polar(x, dtype=torch.float64), plain) > 0.1


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("prescale", ["frobenius", "schatten"])
def test_zero_rows_and_columns_leave_the_rest_as_it_is(form, prescale) -> None:
    x = gaussian(2, 24, 40)
    plain = polar(x, "polar-express", torch.float64, form, prescale)
    for rows, columns in ((30, 40), (24, 55), (40, 40), (60, 40)):  # the last makes the other side the shorter
        padded = torch.zeros(2, rows, columns, dtype=torch.float64)
        padded[:, :24, :40] = x
        result = polar(padded, "polar-express", torch.float64, form, prescale)
        assert (result[:, :24, :40] - plain).abs().max() < 1e-13
        assert (result[:, 24:] == 0).all()
        assert (result[:, :, 40:] == 0).all()


# Edges


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_zero_and_rank_deficient_matrices_are_finite(name, form, dtype) -> None:
    x = gaussian(4, 30, 20)
    x[0] = 0
    x[1] = torch.outer(gaussian(30, seed=5), gaussian(20, seed=6))
    x[2] = gaussian(30, 3, seed=7) @ gaussian(3, 20, seed=8)
    result = polar(given(x, dtype), name, dtype, form)
    assert (result[0] == 0).all()
    assert result.isfinite().all()
    largest = torch.linalg.matrix_norm(result.double(), ord=2)
    assert (largest[1:] > 0.5).all()
    assert (largest <= OVERSHOOT[name] + 2 * bound(name, dtype)).all()


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_sick_matrix_does_not_touch_its_neighbours(form) -> None:
    x = gaussian(3, 12, 20).float()
    healthy = polar(x, dtype=torch.float32, form=form)
    for value in (float("nan"), float("inf")):
        sick = x.clone()
        sick[1, 3, 4] = value
        result = polar(sick, dtype=torch.float32, form=form)
        assert result[1].isnan().any()
        assert torch.equal(result[[0, 2]], healthy[[0, 2]])


def test_what_is_no_batch_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="batch"):
        polar(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="no coefficients 'kj'"):
        polar(torch.zeros(1, 3, 3), "kj")


# Bounds


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_no_singular_value_overshoots(name) -> None:
    """T5. Over all that a singular value can be after the division, and on matrices; far from the 1.4 of `unsound`."""
    safety, steps = COEFFICIENTS[name]
    sigma = torch.linspace(0, 1 / safety, 1_000_001, dtype=torch.float64)
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert sigma.min() >= 0
    assert 0.99 * OVERSHOOT[name] < sigma.max() <= OVERSHOOT[name] < 1.4
    for x in (gaussian(3, 64, 64), gaussian(3, 64, 256), power_law(64, 256, 1.0)):
        largest = torch.linalg.matrix_norm(polar(x.float(), name, torch.float32).double(), ord=2)
        assert largest.max() <= OVERSHOOT[name] + 2e-5


def test_what_is_out_of_norm_is_unsound() -> None:
    factor = torch.linalg.qr(gaussian(1, 20, 12))[0].expand(6, 20, 12).clone()
    factor *= torch.tensor([0.0, 1e-3, 1.21, 1.41, torch.inf, torch.nan]).view(-1, 1, 1)
    assert unsound(factor.square().sum(dim=(-2, -1)), (20, 12)).tolist() == [False, False, False, True, True, True]


# The Gram form


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_gram_form_is_the_standard_one(name) -> None:
    for x in (gaussian(60, 64, 64), gaussian(3, 64, 256), power_law(64, 256, 1.0), power_law(64, 256, 1.5)):
        for y, expected in zip(x.unsqueeze(1), reference(x, name).unsqueeze(1), strict=True):
            assert error(polar(y, name, torch.float64, "gram"), expected) < 1e-10
            assert error(polar(y.float(), name, torch.float32, "gram"), expected) < 2e-5
            # The result is rounded to the wanted precision, the iteration is not: below what half products cost.
            assert error(polar(y.float(), name, torch.bfloat16, "gram"), expected) < 2.0**-8


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_gram_matrix_in_bf16_would_not_be(name, monkeypatch) -> None:
    """Why the form works in fp32 and a Gram matrix must never be summed in bf16: its small eigenvalues are what counts."""
    x = power_law(64, 256, 1.5)
    expected = reference(x, name)
    assert error(polar(x.float(), name, torch.float32, "gram"), expected) < 2e-5
    true = module._gram_factor
    monkeypatch.setattr(module, "_gram_factor", lambda gram, steps: true(gram.bfloat16().to(gram.dtype), steps))
    assert not error(polar(x.float(), name, torch.float32, "gram"), expected) < 250 * 2e-5


# Batches


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("prescale", ["frobenius", "schatten"])
def test_a_matrix_comes_out_the_same_to_the_bit_in_any_batch(dtype, form, prescale) -> None:
    for shape in ((5, 7), (7, 9), (20, 12), (33, 65), (64, 64)):
        x = given(gaussian(5, *shape), dtype)
        together = polar(x, "polar-express", dtype, form, prescale)
        for n in range(1, 5):
            assert torch.equal(polar(x[:n], "polar-express", dtype, form, prescale), together[:n])
        assert torch.equal(polar(x[3:4], "polar-express", dtype, form, prescale), together[3:4])


def test_two_dimensional_products_are_not_the_same_to_the_bit() -> None:
    """Why `polar` takes batches only: a lone matrix multiplied by 2-D products would depend on who owns what."""
    x = gaussian(8, 5, 7).float()
    assert any(not torch.equal(x[i] @ x[i].T, (x @ x.mT)[i]) for i in range(8))
