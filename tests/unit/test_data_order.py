"""The order of the data: a permutation per epoch, seekable, and the same for every number of ranks."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches import Batches
from trainer.data.order import permute, sequence_ids
from trainer.data.stream import Part, Stream

SEED = st.integers(0, 2**63 - 1)
WIDTH = 5  # sequence_length + 1


class FakeSplit:
    """Row `i` holds i * 10, i * 10 + 1, ...: every token tells its row and its place. Counts the reads."""

    def __init__(self, sequences: int) -> None:
        self.sequences, self.reads = sequences, []

    def rows(self, ids):
        self.reads.append(len(ids))
        assert ((ids >= 0) & (ids < self.sequences)).all()
        return ids[:, None] * 10 + np.arange(WIDTH), ids + 1

    def bytes(self, ids):
        return ids + 1


def stream(split, seed):
    """One source in the order of a seed; without one, the split as it lies."""
    return split if seed is None else Stream({"data": Part(split, Fraction(1))}, seed)


def walk(start, count, n, seed, **options):
    return sequence_ids(np.arange(start, start + count), n, seed, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), SEED, st.integers(0, 10**6))
def test_every_key_is_a_bijection(n, seed, epoch):
    images = permute(np.arange(n), n, (seed, epoch))
    assert sorted(images.tolist()) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(50, 3000), SEED, st.integers(0, 10**6))
def test_epochs_and_seeds_differ(n, seed, epoch):
    here = permute(np.arange(n), n, (seed, epoch))
    assert (here != permute(np.arange(n), n, (seed, epoch + 1))).mean() > 0.5
    assert (here != permute(np.arange(n), n, (seed + 1, epoch))).mean() > 0.5
    assert (here != np.arange(n)).mean() > 0.5


def test_one_index_needs_no_table():
    n = 10**15
    some = np.array([0, 1, n // 2, n - 1])
    together = permute(some, n, (7, 3))
    assert len(set(together.tolist())) == 4
    assert ((together >= 0) & (together < n)).all()
    assert [int(permute(some[i : i + 1], n, (7, 3))[0]) for i in range(4)] == together.tolist()


def test_places_are_spread_evenly():
    n = 1000
    total = np.zeros(n)
    for epoch in range(400):
        total += permute(np.arange(n), n, (1, epoch))
    # The mean of 400 uniform draws from [0, n) has a deviation of n / sqrt(12 * 400), about 14.4.
    assert np.abs(total / 400 - (n - 1) / 2).max() < 6 * 14.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 200), st.lists(st.integers(0, 30), max_size=8), SEED)
def test_steps_of_any_size_walk_the_same_stream(n, start, counts, seed):
    whole = walk(start, sum(counts), n, seed).tolist()
    pieces, position = [], start
    for count in counts:
        pieces += walk(position, count, n, seed).tolist()
        position += count
    assert pieces == whole


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9), SEED)
def test_an_epoch_takes_every_sequence_once(n, epoch, seed):
    assert sorted(walk(epoch * n, n, n, seed).tolist()) == list(range(n))
    assert sorted(walk(epoch * n, n, n, seed, reshuffle=False).tolist()) == list(range(n))


def _rows_seen(split, seed, world, rows, micro_steps, position, count):
    """Ids of the unmasked rows of all ranks, put at the places that the layout gives them."""
    seen = {}
    for rank in range(world):
        steps = Batches(stream(split, seed), rank, world, rows, micro_steps).at(position, count)
        assert len(steps) == micro_steps
        for j, (inputs, targets, positions) in enumerate(steps):
            assert positions is None
            assert inputs.shape == targets.shape == (rows, WIDTH - 1)
            assert str(inputs.dtype) == str(targets.dtype) == "torch.int64"
            for i in range(rows):
                if (targets[i] == -100).all():
                    assert (inputs[i] == 0).all()
                    continue
                assert (targets[i] == inputs[i] + 1).all()
                seen[j * world * rows + rank * rows + i] = int(inputs[i, 0]) // 10
    return [seen[place] for place in sorted(seen)], sorted(seen)


@pytest.mark.parametrize("seed", [11, None])
@pytest.mark.parametrize("count", [1, 7, 29, 30])
def test_all_worlds_see_the_same_sequences_in_the_same_order(seed, count):
    n, position = 50, 20 if seed is None else 35  # with a seed the step crosses the end of an epoch
    expected = np.arange(position, position + count) if seed is None else walk(position, count, n, seed)
    for world, rows, micro_steps in [(1, 30, 1), (1, 4, 8), (2, 5, 3), (3, 2, 5), (5, 2, 3), (5, 3, 2)]:
        ids, places = _rows_seen(FakeSplit(n), seed, world, rows, micro_steps, position, count)
        assert ids == expected.tolist(), (world, rows, micro_steps)
        assert places == list(range(count))


def test_a_rank_reads_once_and_only_its_own_rows():
    split = FakeSplit(1000)
    Batches(stream(split, 0), 1, 4, 3, 5).at(100, 60)
    assert split.reads == [15]


def test_bytes_are_those_of_all_ranks():
    split = FakeSplit(97)
    expected = int((walk(40, 80, 97, 3) + 1).sum())
    assert {Batches(stream(split, 3), rank, 2, 8, 5).bytes(40, 80) for rank in range(2)} == {expected}


def test_the_package_loads_without_torch():
    import subprocess
    import sys

    code = "import sys, trainer.data, trainer.data.prepare, trainer.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_batches_want_nothing_but_sequences_and_rows():
    split = SimpleNamespace(sequences=3, rows=FakeSplit(3).rows)
    assert len(Batches(stream(split, 0), 0, 1, 2, 1).at(0, 2)) == 1


def test_the_stream_has_another_order_in_every_epoch():
    orders = [walk(epoch * 500, 500, 500, 9) for epoch in range(4)]
    assert all((a != b).mean() > 0.9 for i, a in enumerate(orders) for b in orders[:i])


def test_passes_repeat_where_they_are_asked_to():
    orders = [walk(epoch * 500, 500, 500, 9, reshuffle=False).tolist() for epoch in range(4)]
    assert all(order == walk(0, 500, 500, 9).tolist() for order in orders)
    split = FakeSplit(50)
    repeated = Stream({"data": Part(split, Fraction(1))}, 9, "repeat")
    assert repeated.ids(np.arange(70))[1].tolist() == walk(0, 70, 50, 9, reshuffle=False).tolist()
