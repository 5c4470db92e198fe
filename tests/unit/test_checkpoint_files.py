"""A generation is believed only if every bit is as listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.retention import drop_newer, prune
from trainer.checkpoint.room import check_room
from trainer.checkpoint.save import all_finite
from trainer.files import sha256_file
from trainer.guard import faults
from trainer.outcome import Outcome, RunError


def generation(checkpoints: Path, step: int, **state: bool) -> Path:
    folder = checkpoints / manifests.name(step)
    folder.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(bytes(range(256)) * 8 + f"{name}{step}".encode())
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(folder.iterdir())}
    manifest = Manifest(
        step=step, position=step, world_size=2, files=files, tensors={}, config={"lr": 0.1}, state=state
    )
    manifests.write(folder, manifest)
    return folder


def test_a_good_generation_verifies_and_reads_back(tmp_path) -> None:
    folder = generation(tmp_path, 3)
    assert manifests.verify(folder) == manifests.read(folder)
    assert manifests.verify(folder).step == 3


def test_temporary_and_quarantined_folders_do_not_count(tmp_path) -> None:
    generation(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-1").mkdir()
    bad = generation(tmp_path, 3)
    place = manifests.quarantine(bad, "why")
    generation(tmp_path, 3)
    again = manifests.quarantine(tmp_path / "step-00000003", "again")
    assert [p.name for p in manifests.generations(tmp_path)] == ["step-00000001"]
    assert (place.name, again.name) == ("step-00000003", "step-00000003-2")
    assert (place / "reason.txt").read_text() == "why\n"


def test_retention_counts_good_generations_only(tmp_path) -> None:
    for step in range(1, 6):
        generation(tmp_path, step)
    for step in (4, 5):
        (tmp_path / manifests.name(step) / "a.safetensors").unlink()
    (tmp_path / "step-00000006.tmp-2").mkdir()
    removed, problem = prune(tmp_path, 1)
    assert [p.name for p in manifests.generations(tmp_path)] == [manifests.name(s) for s in (5, 4, 3)]
    assert set(removed) == {manifests.name(1), manifests.name(2), "step-00000006.tmp-2"}
    assert problem == ""


def steps(checkpoints: Path) -> list[int]:
    return [manifests.step_of(folder) for folder in manifests.generations(checkpoints)]


def test_a_streak_of_bad_steps_cannot_rotate_the_good_ones_away(tmp_path) -> None:
    for step, good in enumerate([True, True, False, True, False, False, False], 1):
        generation(tmp_path, step, good=good)
    assert prune(tmp_path, 2).removed == ["step-00000001"]
    assert steps(tmp_path) == [7, 6, 5, 4, 3, 2]
    for keep in (1, 0):
        prune(tmp_path, keep)
        assert steps(tmp_path) == [7, 6, 5, 4]
    generation(tmp_path, 8)  # without a word it is good
    prune(tmp_path, 1)
    assert steps(tmp_path) == [8]


def test_pruning_leaves_alone_what_the_background_writes(tmp_path) -> None:
    for name in ("step-00000002.tmp-1", "step-00000003.tmp-2"):
        (tmp_path / name).mkdir()
    assert prune(tmp_path, 1, writing="step-00000003.tmp-2").removed == ["step-00000002.tmp-1"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.tmp-2"]


def test_an_error_while_pruning_is_a_sentence_and_the_next_time_removes(tmp_path, monkeypatch) -> None:
    for step in range(1, 5):
        generation(tmp_path, step)
    monkeypatch.setattr(faults, "_faults", faults.parse("EROFS@save.prune"))
    removed, problem = prune(tmp_path, 2)
    assert removed == ["step-00000002"]
    assert problem.startswith("step-00000001 could not be removed and stays for now: [Errno 30] Read-only file system")
    manifests.verify(tmp_path / "step-00000001")
    assert prune(tmp_path, 2) == (["step-00000001"], "")


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch) -> None:
    generation(tmp_path, 1), generation(tmp_path, 2)
    monkeypatch.setattr(
        manifests.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    assert "step-00000001 could not be removed" in prune(tmp_path, 1).problem
    assert not (tmp_path / "step-00000001" / manifests.FILE).exists()


def test_what_is_newer_than_the_step_gone_back_to_is_dropped(tmp_path) -> None:
    for step in (1, 2, 3):
        generation(tmp_path, step, good=step == 1)
    assert set(drop_newer(tmp_path, 1).removed) == {"step-00000002", "step-00000003"}
    assert steps(tmp_path) == [1]


def test_steps_of_nine_digits_are_newer(tmp_path) -> None:
    generation(tmp_path, 99_999_999), generation(tmp_path, 100_000_000)
    assert steps(tmp_path) == [100_000_000, 99_999_999]


def test_room_for_one_and_for_all(tmp_path, monkeypatch) -> None:
    tensors = {
        "a": torch.empty(250_000, device="meta"),
        "b": torch.empty(500_000, dtype=torch.bfloat16, device="meta"),
    }  # 2 MB
    free = {"bytes": 0}
    monkeypatch.setattr(
        "trainer.checkpoint.room.shutil.disk_usage", lambda _: type("usage", (), {"free": free["bytes"]})
    )
    free["bytes"] = 1_990_000
    with pytest.raises(RunError, match=r"takes 2\.0 MB, and 2\.0 MB are free") as refused:
        check_room(tmp_path / "not/there", tensors, 2)
    assert refused.value.outcome is Outcome.NO_SPACE
    free["bytes"] = 5_990_000
    text = check_room(tmp_path, tensors, 2)
    assert "3 checkpoints of 2.0 MB" in text
    assert "take 6.0 MB, and there is room for 6.0 MB" in text
    generation(tmp_path, 1), generation(tmp_path, 2)  # what is there will make room: 2 x 2 files of 2 kB
    free["bytes"] = 5_992_000
    assert check_room(tmp_path, tensors, 2) == ""
    assert "GB" in check_room(tmp_path, tensors, 2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_seen(dtype, value) -> None:
    for size in (1, 7, 65, 4099):
        for place in {0, size // 2, size - 1}:
            bad = torch.randn(size).to(dtype)
            assert all_finite({"a": bad})
            bad[place] = value
            assert not all_finite({"a": torch.ones(3), "bad": bad, "none": torch.empty(0)})
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite({"largest": largest, "integers": torch.arange(3), "none": torch.empty(0, 3)})
    assert all_finite({})
