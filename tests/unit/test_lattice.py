"""Coordinate descent on lattices whose optimum is known: it gets there, certifies only what it saw, grows, asks once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from launch.lattice import Axis, Found, Point, descend, grid

EPOCHS = Axis("epochs", (4.0, 8.0, 16.0), 1.0, 64.0)
RATES = Axis("lr", (1e-3, 3e-3, 1e-2), 1e-6, 0.03)
DECAYS = Axis("weight_decay", (0.4, 0.8, 1.6, 3.2), 1e-4, 30.0)
AXES = (EPOCHS, RATES, DECAYS)


def bowl(*best: float) -> Callable[[Point], float]:
    """Convex in the logarithms, with a term that couples the axes."""

    def loss(point: Point) -> float:
        x = [math.log(value / at) for value, at in zip(point, best, strict=True)]
        return 3.4 + sum(v * v for v in x) / 10 + x[1] * x[2] / 20

    return loss


class Asked:
    """A loss as the search sees it, which remembers what it was asked for."""

    def __init__(self, loss: Callable[[Point], float], most: int | None = None) -> None:
        self.loss, self.most, self.points, self.calls = loss, most, list[Point](), list[int]()

    def __call__(self, points: list[Point]) -> dict[Point, float]:
        room = len(points) if self.most is None else self.most - len(self.points)
        self.calls.append(len(points))
        self.points += points[:room]
        return {point: self.loss(point) for point in points[:room]}


def searched(loss: Callable[[Point], float], start: Point, noise: float = 0.0, axes=AXES) -> tuple[Found, Asked]:
    asked = Asked(loss)
    found = descend(axes, start, asked, noise)
    assert len(set(asked.points)) == len(asked.points), "no point is asked for twice"
    assert set(found.losses) == set(asked.points)
    return found, asked


@pytest.mark.parametrize("start", [(4.0, 1e-3, 0.4), (16.0, 1e-2, 3.2), (8.0, 3e-3, 0.8)])
@pytest.mark.parametrize("best", [(8.0, 3e-3, 1.6), (8.0, 3e-3, 0.8)])
def test_a_convex_lattice_leads_to_its_optimum_which_is_certified(start, best) -> None:
    found, asked = searched(bowl(*best), start)
    assert found.point == best
    assert found.certified
    assert len([n for n in found.neighbours if n.point is not None]) == 6
    losses = [found.losses[point] for point in found.moves]
    assert found.moves[0] == start
    assert losses == sorted(losses, reverse=True)
    assert len(asked.points) < len(EPOCHS.values) * len(RATES.values) * len(DECAYS.values)
    assert max(asked.calls) >= 3, "a cross is asked for at once"


def test_a_neighbour_without_a_loss_refuses_the_certificate_and_is_named() -> None:
    best, sick = (8.0, 3e-3, 1.6), (8.0, 1e-2, 1.6)
    found, _ = searched(lambda p: math.nan if p == sick else bowl(*best)(p), (4.0, 1e-3, 0.8))
    assert (found.point, found.certified, found.missing) == (best, False, (sick,))


def test_a_sick_start_gives_way_and_a_lattice_without_losses_ends() -> None:
    best, start = (8.0, 3e-3, 1.6), (8.0, 3e-3, 0.8)
    found, _ = searched(lambda p: math.nan if p == start else bowl(*best)(p), start)
    assert found.point == best
    assert found.missing == (start,)
    found, asked = searched(lambda p: math.nan, start)
    assert (found.point, found.certified, len(found.missing)) == (start, False, len(asked.points))


def test_the_lattice_grows_by_its_own_ratio_where_the_optimum_lies_on_its_edge() -> None:
    best = (32.0, 3e-4, 12.8)
    found, _ = searched(bowl(*best), (8.0, 3e-3, 1.6))
    assert found.point == best
    assert found.certified
    assert found.axes[0].values == (4.0, 8.0, 16.0, 32.0, 64.0)
    assert found.axes[1].values == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert found.axes[2].values == (0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)


def test_an_axis_ends_at_its_bounds_and_its_end_counts_as_looked_at() -> None:
    found, _ = searched(bowl(200.0, 0.2, 0.1), (8.0, 3e-3, 0.4))
    assert found.point[:2] == (64.0, 0.03)
    assert found.certified
    assert [(n.axis, n.up) for n in found.neighbours if n.point is None] == [("epochs", True), ("lr", True)]


@pytest.mark.parametrize(
    ("values", "up", "expected"),
    [
        ((4.0, 8.0), True, 16.0), ((4.0, 8.0), False, 2.0), ((1e-3, 3e-3, 1e-2), True, 3e-2), ((0.0, 0.1), True, None),
        ((1e-3, 3e-3, 1e-2), False, 3e-4), ((0.0, 0.1, 0.2), True, 0.4), ((0.0, 0.1, 0.2), False, None), ((5.0,), True, None),
        ((1.0, 2.0), False, None),
    ],
)  # fmt: skip
def test_growth(values, up, expected) -> None:
    axis = Axis("x", values, 1e-4 if values[0] < 1 else 1.0, 100.0)
    grown = axis.grown(up)
    added = set(grown.values) - set(values)
    assert added == (set() if expected is None else {expected})
    assert list(grown.values) == sorted(grown.values)


def test_zero_decay_is_the_end_of_the_axis() -> None:
    axes = (EPOCHS, RATES, Axis("weight_decay", (0.0, 0.1, 0.2), 1e-4, 30.0))
    found, _ = searched(lambda p: bowl(8.0, 3e-3, 1.0)((*p[:2], 1.0)) + p[2], (8.0, 3e-3, 0.2), axes=axes)
    assert found.point == (8.0, 3e-3, 0.0)
    assert found.certified


def test_an_axis_of_one_value_is_held() -> None:
    found, _ = searched(
        bowl(8.0, 3e-3, 9.0), (8.0, 3e-3, 0.8), axes=(EPOCHS, RATES, Axis("weight_decay", (0.8,), 1e-4, 30.0))
    )
    assert found.point[2] == 0.8
    assert found.certified


def test_noise_only_a_clear_difference_moves_and_level_ones_move_to_the_cheapest() -> None:
    start = (8.0, 3e-3, 0.8)
    near = {(8.0, 1e-2, 0.8): 3.29, (4.0, 3e-3, 0.8): 3.30}
    found, _ = searched(lambda p: near.get(p, 3.31), start, noise=0.011)
    assert found.point == start, "0.02 is less than twice 0.011"
    assert found.certified
    found, _ = searched(lambda p: near.get(p, 3.40), start, noise=0.01)
    assert found.moves[:2] == (start, (4.0, 3e-3, 0.8)), "level with the best, and fewer epochs"
    found, _ = searched(lambda p: near.get(p, 3.40), start)
    assert found.moves[:2] == (start, (8.0, 1e-2, 0.8)), "without noise the best is the best"
    found, _ = searched(lambda p: 3.4, start)
    assert found.moves == (start,), "a tie is no reason to move"


def test_what_was_not_tried_ends_the_search_without_a_certificate() -> None:
    asked = Asked(bowl(32.0, 3e-3, 1.6), most=4)
    found = descend(AXES, (8.0, 3e-3, 1.6), asked)
    assert (found.complete, found.certified, found.point) == (False, False, (8.0, 3e-3, 1.6))
    assert len(found.missing) == 3


def test_a_grid_is_asked_for_whole_and_ends_at_its_edges() -> None:
    asked = Asked(bowl(32.0, 3e-3, 1.6))
    found = grid(AXES, asked)
    assert asked.calls == [36]
    assert found.point == (16.0, 3e-3, 1.6)
    assert found.certified
    assert [(n.axis, n.up) for n in found.neighbours if n.point is None] == [("epochs", True)]
    sick = (16.0, 3e-3, 0.8)
    found = grid(AXES, Asked(lambda p: math.nan if p == sick else bowl(32.0, 3e-3, 1.6)(p)))
    assert (found.certified, found.missing) == (False, (sick,))
    level = grid(AXES, Asked(lambda p: 3.4 + p[0] / 1e4), noise=0.01)
    assert level.point[0] == 4.0
