"""The cosine basis, its choice of columns, error feedback, and what DCT-AdamW and Trion come to; defects of released code
(fft_low_rank) are regression tests."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.optim import AdamW, DCTAdamW, Muon, ShardedOptimizer, Trion, dct, feedback


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(kind: type[ShardedOptimizer], start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = kind([weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert optimizer.take_rejected() == 0
    return weight.detach()


@pytest.mark.parametrize("size", [1, 2, 8, 9, 96, 127])
def test_the_basis_is_orthogonal_and_the_fft_is_the_product_with_it(size) -> None:
    """T24. Not with its transpose, as where the released code mixes DCT-II and DCT-III."""
    q = dct.basis(size, torch.float64, torch.device("cpu"))
    assert (q - dct.reference_basis(size)).abs().max() < 1e-13
    assert (q @ q.mT - torch.eye(size).double()).abs().max() < 1e-12
    x = noise(2, 7, size)
    for transform in ("fft", "matmul"):
        assert (dct.coefficients(x, transform) - x @ q.mT).abs().max() < 1e-12
    if size > 2:
        assert (x @ q - x @ q.mT).abs().max() > 0.1


def test_the_best_columns_by_squares_lose_least_and_never_more_than_their_share() -> None:
    """T25, against all choices."""
    for seed in range(5):
        x, q = noise(12, 10, seed=seed), dct.reference_basis(10)
        chosen = dct.choose(dct.scores(dct.coefficients(x), "l2"), 3)

        def lost(rows: Any, x: Tensor = x, q: Tensor = q) -> float:
            return float((x - x @ q[list(rows)].mT @ q[list(rows)]).square().sum())

        best = min(lost(rows) for rows in itertools.combinations(range(10), 3))
        assert lost(chosen.tolist()) == pytest.approx(best, rel=1e-12)
        assert best <= (1 - 3 / 10) * float(x.square().sum())


def test_ties_go_to_the_lower_index() -> None:
    """T28. Whatever the rounding of sums in another order."""
    score = torch.tensor([1.0, 3.0, 3.0 * (1 + 1e-12), 2.0, 2.0 * (1 - 1e-12)]).double()
    assert dct.choose(score, 1).tolist() == [1]
    assert dct.choose(score, 3).tolist() == [1, 2, 3]
    assert dct.choose(torch.zeros(4).double(), 2).tolist() == [0, 1]


def test_small_scores_are_compared_too() -> None:
    assert dct.choose(torch.tensor([1e9, 0.1, 0.2, 5.0, 0.3, 4.0]).double(), 3).tolist() == [0, 3, 5]
    assert dct.choose(torch.tensor([1e-300, 0.0, 1e300, 2e-300], dtype=torch.float64), 3).tolist() == [0, 2, 3]


def test_rotation_by_an_index_is_the_product_of_the_bases() -> None:
    """T26. The released code multiplies into its own input."""
    q = dct.reference_basis(12)
    old, new = torch.tensor([[0, 3, 4, 7]]), torch.tensor([[1, 3, 7, 11]])
    state = noise(1, 5, 4)
    expected = state @ (q[old[0]] @ q[new[0]].mT)
    dct.rotate(state, *dct.moved(old, new))
    assert (state - expected).abs().max() < 1e-12
    assert state[..., 1].any()
    assert not state[..., 0].any()


@pytest.mark.parametrize(("form", "most"), [("8-bit", 0.01), ("4-bit", 0.11)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_coded_rows_come_back(form, most, size) -> None:
    """T27. The released code has 15 levels in 8 bits (error 0.1), and puts the halves of bytes side by side (1.49)."""
    x = noise(3, 50, size) * torch.logspace(-3, 3, 50, dtype=torch.float64).unsqueeze(-1)
    codes, ranges = feedback.encode(x, form)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == (size if form == "8-bit" else -(-size // 2))
    back = feedback.decode(codes, ranges, size, form)
    assert ((back - x).norm(dim=-1) <= 1.5 * most * x.norm(dim=-1) + 1e-12).all()  # rows of all sizes alike
    assert (back - x).norm() / x.norm() < most
    constant = torch.full((2, 3, size), 0.7).double()  # 0 / 0 there
    assert torch.allclose(feedback.decode(*feedback.encode(constant, form), size, form), constant)


def test_halves_of_bytes_are_neighbours() -> None:
    codes, ranges = feedback.encode(torch.arange(16.0).view(1, 1, 16), "4-bit")
    assert codes.flatten().tolist() == [2 * k + 16 * (2 * k + 1) for k in range(8)]
    assert feedback.decode(codes, ranges, 16, "4-bit").flatten().tolist() == list(range(16))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_of_full_rank_they_are_adamw_and_muon_in_another_basis(shape) -> None:
    """T26: AdamW on the problem turned by Q; Muon, since the polar factor of B Q times Q^T is that of B."""
    start, gradients, wide = noise(*shape), [noise(*shape, seed=1 + i) for i in range(4)], shape[0] < shape[1]
    q = dct.reference_basis(min(shape))

    def turn(x: Tensor) -> Tensor:
        return (x.mT if wide else x) @ q.mT

    expected = trained(AdamW, turn(start), [turn(g) for g in gradients], lr=0.1) @ q
    found = trained(DCTAdamW, start, gradients, lr=0.1, rank=min(shape), refresh=3)
    assert (found - (expected.mT if wide else expected)).abs().max() < 1e-9
    first = gradients[:1]
    muon = trained(Muon, start, first, lr=0.1, polar_dtype="fp64", polar="8+2")
    assert (trained(Trion, start, first, lr=0.1, rank=min(shape), polar="8+2") - muon).abs().max() < 1e-9


@pytest.mark.parametrize("form", ["fp32", "8-bit", "4-bit"])
def test_what_is_left_out_is_kept(form) -> None:
    """T27: A = a Q + X."""
    weight = nn.Parameter(torch.zeros(20, 12).double())
    optimizer = DCTAdamW([weight], lr=0.1, rank=4, error_feedback=form)
    weight.grad = noise(20, 12)
    optimizer.step()
    state, q = optimizer.state[weight], dct.reference_basis(12)
    kept = q[state["indices"].flatten()]
    left_out = weight.grad - weight.grad @ kept.mT @ kept
    found = state["feedback"]
    if form != "fp32":
        found = feedback.decode(state["feedback"], state["feedback_range"], 12, form)
    bound = {"fp32": 1e-12, "8-bit": 0.01, "4-bit": 0.15}[form]
    assert (found - left_out).norm() <= bound * left_out.norm()


def test_the_first_step_in_a_new_column_is_no_larger_than_others() -> None:
    """With the age of the run in the bias correction it would be 0.1 / sqrt(0.05) of the sign for beta2 0.95 at least, and 3.2
    for 0.999; with its own age it is 1."""
    q = dct.reference_basis(12)
    weight = nn.Parameter(torch.zeros(20, 12).double())
    optimizer = DCTAdamW([weight], lr=1.0, rank=1, beta2=0.999)
    for step in range(30):
        column = 3 if step < 29 else 7
        weight.grad = noise(20, 1, seed=step) * q[column]
        before = weight.detach().clone()
        optimizer.step()
    assert optimizer.state[weight]["indices"].flatten().tolist() == [7]
    moved = (weight.detach() - before) @ q[7]
    assert torch.allclose(moved.abs(), torch.ones(20).double(), atol=1e-5)


def test_matrices_of_several_sizes_have_a_basis_each() -> None:
    """The released code has one for the whole model."""
    weights = [nn.Parameter(noise(*shape).float()) for shape in ((20, 12), (9, 30), (7, 7))]
    before = [w.detach().clone() for w in weights]
    optimizer = Trion(weights, lr=0.1, rank=5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize(("rank", "words"), [(32, 2 * 96 * 32 + 2 * 2 * 32), (64, 2 * 96 * 64 + 2 * 2 * 64)])
def test_the_state_of_dct_adamw_is_two_factors_and_what_there_is_per_column(rank, words) -> None:
    """2 l r words and, in int64, an index and an age per column."""
    weight = nn.Parameter(noise(96, 64).float())
    optimizer = DCTAdamW([weight], rank=rank)
    assert sum(value.nbytes for key, value in optimizer.state[weight].items() if key != "step") == 4 * words


@pytest.mark.parametrize(("kind", "options", "message"), [
    (DCTAdamW, {"rank": 6}, "rank 6 does not fit the short side 5 of a 9 x 5 weight; give 1 to that"),
    (Trion, {"rank": 6}, "rank 6 does not fit the short side 5 of a 9 x 5 weight; give 1 to that"),
    (Trion, {"rank": 0}, "rank 0 does not fit"), (Trion, {"rank": 1.5}, "rank 1.5 is no share of the short side"),
    (DCTAdamW, {"refresh": 0}, "refresh of dct_adamw is 0: input should be greater than or equal to 1"),
    (DCTAdamW, {"refresh": 1.5}, "refresh of dct_adamw is 1.5: input should be a valid integer"),
    (DCTAdamW, {"beta1": 1}, "beta1 of dct_adamw is 1: input should be less than 1"),
    (DCTAdamW, {"error_feedback": "2-bit"}, "error_feedback '2-bit' is unknown to dct_adamw; use one of none, fp32"),
    (Trion, {"norm": "l3"}, "norm 'l3' is unknown to trion; use one of l2, l1"),
    (Trion, {"polar": "none"}, "polar 'none' is unknown to trion"),
])  # fmt: skip
def test_bad_options_are_named(kind, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(noise(9, 5))], **options)
