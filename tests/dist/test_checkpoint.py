"""Generations: saved at some number of ranks, loaded at others, never believed when damaged."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from tests.dist import bodies


@pytest.mark.parametrize("saved_at", [2, 3])
def test_saved_at_2_and_3_loads_bit_equal_at_1_2_3(group, tmp_path, saved_at) -> None:
    assert group(saved_at, bodies.save_generation, str(tmp_path), 1) == ["step-00000001"] * saved_at
    for world in (1, 2, 3):
        name, position, count, dtypes = group(world, bodies.load_newest, str(tmp_path))[0]
        assert (name, position, count) == ("step-00000001", 8, 7)
        assert dtypes["model.bf16"] == "torch.bfloat16"
        assert dtypes["optim.index"] == "torch.int64"


def test_a_damaged_newest_is_quarantined_and_the_one_before_taken(group, tmp_path) -> None:
    for step in (1, 2):
        group(2, bodies.save_generation, str(tmp_path), step)
    shard = sorted((tmp_path / "step-00000002").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    answers = group(2, bodies.load_newest, str(tmp_path))
    assert [answer[0] for answer in answers] == ["step-00000001"] * 2
    assert shard.name in (tmp_path / "quarantine/step-00000002/reason.txt").read_text()
    assert not (tmp_path / "step-00000002").exists()


def test_a_planted_pickle_is_refused_and_never_run(group, tmp_path) -> None:
    group(2, bodies.save_generation, str(tmp_path), 1)
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    (tmp_path / "step-00000001/.metadata").write_bytes(pickle.dumps(Payload()))
    assert group(2, bodies.load_newest, str(tmp_path)) == [None, None]
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload is a real one
    assert witness.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [("dtype", "float64 [6, 4]"), ("shape", "float32 [6, 5]"), ("missing", "optim.step"), ("extra", "absent in the checkpoint")],
)
def test_a_state_that_does_not_fit_is_named(group, tmp_path, change, words) -> None:
    group(2, bodies.save_generation, str(tmp_path), 1)
    for text in group(2, bodies.load_into_other, str(tmp_path), change):
        assert words in text


def test_full_disk_on_one_rank_is_the_same_error_on_all_and_loses_nothing(group, tmp_path) -> None:
    group(2, bodies.save_generation, str(tmp_path), 1)
    for outcome, what in group(2, bodies.save_on_full_disk, str(tmp_path)):
        assert outcome == "no space"
        assert os.strerror(errno.ENOSPC) in what
    assert [p.name for p in Path(tmp_path).iterdir()] == ["step-00000001"]
    assert group(2, bodies.load_newest, str(tmp_path))[0][0] == "step-00000001"


def test_an_existing_generation_is_never_written_over(group, tmp_path) -> None:
    group(2, bodies.save_generation, str(tmp_path), 1)
    with pytest.raises(AssertionError, match="there is a checkpoint step-00000001 already"):
        group(2, bodies.save_generation, str(tmp_path), 1)
