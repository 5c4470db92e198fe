"""Laws: published numbers, coverage of the intervals, what must be flagged, and units (arXiv 2509.14786)."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.laws.efficiency import best_observed, data_efficiency, efficiencies, retention
from trainer.laws.nested import limits
from trainer.laws.points import Point
from trainer.laws.power_law import fit_many
from trainer.outcome import RunError

N = np.array([0.15, 0.3, 0.6, 1.4])  # billions of parameters
K_LIMITS = (3.495, 3.273, 3.212, 3.174)  # of the paper's ensembles at 209M tokens
SINGLE = (3.776, 3.601, 3.514, 3.465)  # its regularized single models
STANDARD = (1.282, 0.2306, 1.9115)  # its law over D in billions of the standard recipe, unrounded


def points(axis: str, x, y, **held: float) -> list[Point]:
    return [Point({axis: float(a), **held}, float(b), f"row {i}") for i, (a, b) in enumerate(zip(x, y, strict=True))]


def grid(noise: float, seed: int) -> list[Point]:
    """Ensembles of 1 to 5 members at the four sizes; K is the first axis."""
    rng = np.random.default_rng(seed)
    k = np.arange(1, 6)
    return [
        Point({"k": float(one), "n": float(n)}, float(c + 0.3 / one + noise * rng.normal()), "row")
        for n, c in zip(N, K_LIMITS, strict=True)
        for one in k
    ]


def test_the_law_of_the_single_models_is_the_published_one() -> None:
    law = limits(points("n", N, SINGLE)).stages[0].laws[0]
    assert (law.a, law.b, law.c) == pytest.approx((0.05, 1.02, 3.43), abs=0.01)
    assert law.flags == []


def test_the_limit_of_the_ensembles_is_the_refit_of_the_table() -> None:
    assert fit_many(N, np.array([K_LIMITS])).c[0] == pytest.approx(3.169, abs=5e-4)


@pytest.mark.parametrize(("loss", "ratio"), [(3.43, 2.29), (3.17, 5.17), (3.4625, 2.09), (3.74974, 1.0)])
def test_efficiency_has_the_published_ratios(loss, ratio) -> None:
    assert float(data_efficiency(loss, 3.74974, *STANDARD)) == pytest.approx(ratio, abs=0.005)


def test_efficiency_is_without_bound_at_the_limit_of_the_baseline() -> None:
    assert data_efficiency([1.9115, 1.8, 3.0], 3.74974, *STANDARD)[:2].tolist() == [np.inf, np.inf]


def test_retention_is_the_published_one_and_needs_a_gain() -> None:
    assert retention(3.58, 3.3635, 3.32) == pytest.approx(0.833, abs=5e-4)
    with pytest.raises(RunError, match="not below the single"):
        retention(3.3, 3.3, 3.32)


def test_parameters_in_billions_or_in_millions_rescale_a_alone() -> None:
    y = np.array([SINGLE, K_LIMITS])
    billions, millions = fit_many(N, y), fit_many(1000 * N, y)
    np.testing.assert_allclose(millions.b, billions.b, rtol=1e-9)
    np.testing.assert_allclose(millions.c, billions.c, rtol=1e-9)
    np.testing.assert_allclose(millions.a, billions.a * 1000**billions.b, rtol=1e-9)


def test_the_fit_is_the_least_squares_one() -> None:
    """No law near it and within the bounds has smaller squares."""
    rng = np.random.default_rng(0)
    y = 0.3 / np.arange(1, 9) + 3.3 + 0.01 * rng.normal(size=(1, 8))
    found = fit_many(np.arange(1.0, 9), y)
    for scale in (1e-2, 1e-3, 1e-4):
        a, b, c = (v * (1 + scale * rng.normal(size=2000)) for v in (found.a, found.b, found.c))
        others = ((y - a[:, None] * np.arange(1, 9) ** -b[:, None] - np.minimum(c, y.min())[:, None]) ** 2).sum(axis=1)
        assert others.min() > found.squares[0] * (1 - 1e-9)


EIGHT = np.arange(1.0, 9), (0.3, 1.0, 3.27)
FOUR = N, (0.05, 1.02, 3.43)


@pytest.mark.parametrize(("x", "truth", "noise"), [(*EIGHT, 0.001), (*EIGHT, 0.005), (*EIGHT, 0.01), (*FOUR, 0.01)])
def test_intervals_hold_the_truth_as_often_as_they_say(x, truth, noise) -> None:
    a, b, c = truth
    rng = np.random.default_rng(5)
    held = np.zeros(3)
    for repeat in range(200):
        y = a * x**-b + c + noise * rng.normal(size=len(x))
        law = limits(points("n", x, y), draws=200, seed=repeat).stages[0].laws[0]
        for i, name in enumerate("abc"):
            low, high = law.interval(name)
            held[i] += low <= truth[i] <= high
    assert (held / 200 >= 0.90).all(), held / 200
    assert (held / 200 <= 0.99).all(), held / 200


def test_nested_limits_are_told_from_unidentified_ones() -> None:
    flagged = {
        noise: sum(
            any("limit unidentified" in flag for flag in limits(grid(noise, seed), draws=100).stages[1].laws[0].flags)
            for seed in range(12)
        )
        for noise in (0.001, 0.01)
    }
    assert flagged[0.001] == 0
    assert flagged[0.01] >= 9, flagged


def test_noise_of_the_innermost_losses_goes_through_to_the_last_limit() -> None:
    """Intervals of the nested limit as computed for the paper's table: [3.15, 3.19] at 0.002, [3.06, 3.20] at 0.005."""
    narrow, wide = (limits(grid(0.0, 0), noise=noise).stages[1].laws[0].interval("c") for noise in (0.002, 0.005))
    assert narrow == pytest.approx((3.15, 3.19), abs=0.015)
    assert wide == pytest.approx((3.06, 3.20), abs=0.04)


def test_no_asymptote_lies_above_a_loss_that_was_seen() -> None:
    rng = np.random.default_rng(1)
    y = 3.3 + 0.05 * rng.normal(size=(500, 6))
    found = fit_many(np.arange(1.0, 7), y)
    assert (found.c <= y.min(axis=1)).all()
    assert (found.c >= 0).all()
    assert (found.a >= 0).all()


def test_shuffled_labels_show_no_trend_and_true_ones_do() -> None:
    rng = np.random.default_rng(2)
    k = np.arange(1.0, 9)
    y = 0.3 / k + 3.27 + 0.005 * rng.normal(size=8)
    law = limits(points("k", k, y)).stages[0].laws[0]
    assert law.trend < 0.01
    shuffled = [limits(points("k", k, rng.permutation(y)), draws=200, seed=i).stages[0].laws[0] for i in range(30)]
    assert sum(any("no trend" in flag for flag in law.flags) for law in shuffled) >= 25


def test_losses_that_follow_no_power_law_are_a_misfit() -> None:
    kinked = points("k", range(1, 9), [3.6, 3.5, 3.4, 3.3, 3.4, 3.3, 3.2, 3.1])
    assert any("misfit" in flag for flag in limits(kinked, noise=0.01).stages[0].laws[0].flags)
    assert not any("misfit" in flag for flag in limits(kinked, noise=0.05).stages[0].laws[0].flags)


def test_toy_ensembles_gain_as_one_over_k() -> None:
    """Members with logits z + noise: the logit mean's excess over the noiseless loss falls as 1/K (oracle in closed form)."""
    rng = np.random.default_rng(3)
    tokens, vocabulary, members, spread = 4000, 16, 8, 0.3
    z = rng.normal(size=(tokens, vocabulary))
    noisy = spread * rng.normal(size=(members, tokens, vocabulary))

    def nll(logits) -> float:  # expected under the noiseless distribution: no sampling of targets
        p = np.exp(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
        return float(-(p * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1).mean())

    ks = np.arange(1, members + 1)
    losses = [np.mean([nll(z + np.roll(noisy, s, axis=0)[:k].mean(axis=0)) for s in range(members)]) for k in ks]
    law = limits(points("k", ks, losses)).stages[0].laws[0]
    assert law.b == pytest.approx(1, abs=0.1)
    assert law.c == pytest.approx(nll(z), abs=0.001)


def test_three_losses_have_a_law_and_no_interval() -> None:
    law = limits(points("n", N[:3], SINGLE[:3])).stages[0].laws[0]
    assert law.interval("c") is None
    assert any("no interval" in flag for flag in law.flags)
    assert limits(points("n", N[:3], SINGLE[:3]), noise=0.01).stages[0].laws[0].interval("c") is not None


def test_repeats_count_as_points_and_not_as_places() -> None:
    with pytest.raises(RunError, match=r"3 distinct n, and there are 2: n = 0.15, 0.3"):
        limits(points("n", [0.15, 0.15, 0.3, 0.3], [3.7, 3.71, 3.6, 3.61]))


def test_too_few_places_are_named_with_where_they_lack() -> None:
    few = [*points("k", (1, 2, 3), (3.6, 3.5, 3.45), n=0.3), *points("k", (1, 2), (3.5, 3.4), n=0.6)]
    with pytest.raises(RunError, match=r"3 distinct k, and there are 2 at n = 0.6"):
        limits(few)


def test_every_extrapolated_ratio_stands_beside_an_observed_one() -> None:
    d = (0.2097, 0.4194, 0.8389, 1.6777)
    a, b, c = STANDARD
    standard = points("d", d, [a * one**-b + c for one in d])
    joint = [p for one in d for p in points("n", N, [0.05 / n + 3.17 - 0.2 * np.log2(one / 0.2097) for n in N], d=one)]
    recipes = {"standard": standard, "joint": joint}
    gains = efficiencies(recipes, {name: limits(rows) for name, rows in recipes.items()}, "standard")
    assert [gain.d for gain in gains] == list(d)
    first = gains[0]
    assert first.observed_at == {"n": 1.4}
    assert first.limit == pytest.approx(3.17, abs=1e-4)
    assert first.limit_ratio == pytest.approx(5.17, abs=0.01)
    assert 1 < first.observed_ratio < first.limit_ratio
    low, high = first.limit_interval
    assert low <= first.limit_ratio <= high


def test_the_best_observed_loss_is_a_mean_over_repeats() -> None:
    rows = [*points("n", (0.3, 0.3, 0.6), (3.5, 3.7, 3.55), d=0.2)]
    assert best_observed(rows) == {0.2: (3.55, {"n": 0.6})}
