"""A save may fail at every point, on every rank and by every error of the disk: all ranks say the same, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist import bodies_saves as bodies
from trainer.checkpoint import manifest as manifests

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small file system takes the right to mount: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_every_point_errno_and_rank(group, tmp_path) -> None:
    mine, theirs = group(2, bodies.every_fault_of_a_save, str(tmp_path))
    assert mine == theirs
    assert len(mine) == (4 * 2 + 4) * 4
    for fault, (outcome, what, where) in mine:
        number, point, rank = fault.replace("@", " ").split()
        assert outcome == ("no space" if number in ("ENOSPC", "EDQUOT") else "infrastructure"), fault
        assert f"the checkpoint of step 2 could not be saved: [Errno {getattr(bodies.faults.errno, number)}]" in what
        assert point in what
        assert where == f"{rank.replace('=', ' ')}, {tmp_path}/step-00000002.tmp-1"


def test_errors_at_a_load_reach_all_ranks(group, tmp_path) -> None:
    mine, theirs = group(2, bodies.faults_of_a_load, str(tmp_path))
    assert mine == theirs
    for fault, (outcome, what, where) in mine:
        assert outcome == "infrastructure", fault
        assert "Errno 5" in what
        assert fault[-6:].replace("=", " ") in where


def test_a_file_that_the_system_does_not_let_grow(group, tmp_path) -> None:
    mine, theirs = group(2, bodies.save_beyond_limit, str(tmp_path), 100_000)
    assert mine == theirs
    assert mine[0] == "infrastructure"
    assert "File too large" in mine[1]
    assert "rank 1" in mine[2]


def test_a_disk_that_is_really_full(group, small_disk) -> None:
    (mine, names), (theirs, _) = group(2, bodies.save_on_small_disk, str(small_disk))
    assert mine == theirs
    assert mine[0] == "no space"
    assert "No space left on device" in mine[1]
    assert names == ["step-00000001", "step-00000002"]


def test_a_damaged_one_that_cannot_be_moved_is_passed_over_once_and_for_all(group, tmp_path) -> None:
    for step in (1, 2):
        group(2, bodies.save_step, str(tmp_path), step)
    (tmp_path / "step-00000002/extra").touch()
    answers = group(2, bodies.choose_where_nothing_moves, str(tmp_path))
    assert answers == [("step-00000001", "step-00000001", 1)] * 2
    assert (tmp_path / "step-00000002").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights are taken by root only")
def test_a_file_that_cannot_be_read_is_damage(group) -> None:
    with tempfile.TemporaryDirectory() as text:  # pytest's folders are closed to other users
        place = Path(text)
        place.chmod(0o777)
        for step in (1, 2):
            group(2, bodies.save_step, text, step)
        (place / "step-00000002").chmod(0o777)
        next((place / "step-00000002").glob("shard-*")).chmod(0)
        assert group(2, bodies.choose_as_nobody, text) == ["step-00000001"] * 2
        assert "Permission denied" in next((place / "quarantine").glob("*/reason.txt")).read_text()


def test_only_good_generations_when_asked(group, tmp_path) -> None:
    group(2, bodies.save_step, str(tmp_path), 1)
    group(2, bodies.save_step, str(tmp_path), 2, 7)
    (tmp_path / "step-00000003.tmp-1").mkdir()
    text = (tmp_path / "step-00000002/manifest.json").read_text()
    manifest = manifests.read(tmp_path / "step-00000002")
    manifest.state["good"] = False
    manifests.write(tmp_path / "step-00000002", manifest)
    assert (tmp_path / "step-00000002/manifest.json").read_text() != text
    assert group(2, bodies.choose, str(tmp_path), True) == ["step-00000001"] * 2
    assert group(2, bodies.choose, str(tmp_path)) == ["step-00000002"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_shard_that_is_not_finite_is_seen_by_its_rank(group) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        assert group(2, bodies.finite_with_poison, value) == [True, False]
    assert group(2, bodies.finite_with_poison, 3.0) == [True, True]


def test_the_background_writes_what_was_there_at_start(group, tmp_path) -> None:
    assert group(2, bodies.save_in_background, str(tmp_path)) == [["step-00000001", "step-00000002"]] * 2


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("ENOSPC@save.background rank=1", "no space"), ("EIO@save.write rank=1", "infrastructure"), ("EDQUOT@save.rename rank=0", "no space")],
)
def test_an_error_in_the_background_is_raised_by_finish(group, tmp_path, fault, outcome) -> None:
    mine, theirs = group(2, bodies.fail_in_background, str(tmp_path), fault)
    assert mine == theirs
    assert mine[0] == outcome
    assert fault[-6:].replace("=", " ") in mine[2]


def test_a_second_start_tells_that_the_first_failed(group, tmp_path) -> None:
    assert group(2, bodies.fail_then_start, str(tmp_path)) == [("infrastructure", [])] * 2


def test_a_process_does_not_exit_in_the_middle_of_a_save(tmp_path) -> None:
    code = (
        "import torch.distributed as dist; dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "from tests.dist import bodies_saves as b\n"
        "b.strike('sleep=1@save.background')\n"
        f"b.Background().start(b.Path({str(tmp_path)!r}), 1, 1, {{'a': b.torch.ones(3)}}, **b.facts_of(1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert manifests.verify(tmp_path / "step-00000001").step == 1
