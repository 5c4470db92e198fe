"""History and events while the disk is full: no line is lost, doubled, torn or out of order, and nothing is raised."""

from __future__ import annotations

import errno
import json
import os

import pytest

from trainer import files, runfolder
from trainer.files import Lines
from trainer.guard import faults
from trainer.metrics import history
from trainer.metrics.history import History


@pytest.fixture
def disk(monkeypatch):
    """`disk["room"]`: how many bytes the disk still takes; more is written by halves, then refused."""
    state = {"room": 1 << 30}
    write = os.write

    def limited(file: int, data: bytes) -> int:
        if not state["room"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: state["room"]])
        state["room"] -= count
        return count

    monkeypatch.setattr(files.os, "write", limited)
    return state


def test_lines_wait_in_order_and_are_told_once(tmp_path, disk, capfd) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = History(path)
    writer.write(step=1)
    for room, step in ((5, 2), (0, 3), (30, 4), (0, 5)):  # 5 and 30 bytes are half lines
        disk["room"] = room
        writer.write(step=step)
        assert path.read_text() == '{"step": 1}\n'
    disk["room"] = 1 << 30
    writer.write(step=6)
    writer.write(step=7)
    assert [r["step"] for r in history.read(path)] == [1, 2, 3, 4, 5, 6, 7]
    told = capfd.readouterr().out.splitlines()
    assert len(told) == 2
    assert "cannot be written: [Errno 28]" in told[0]
    assert told[1] == "metrics.jsonl: 4 lines that had to wait are written"
    writer.close()


def test_a_line_outlives_its_writer(tmp_path, disk) -> None:
    disk["room"] = 0
    runfolder.record_event(tmp_path, "one", n=1)
    runfolder.record_event(tmp_path, "two", n=2)
    disk["room"] = 1 << 30
    runfolder.record_event(tmp_path, "three", n=3)
    assert [e["event"] for e in runfolder.events(tmp_path)] == ["one", "two", "three"]
    assert not Lines._kept


def test_the_fault_point_of_the_history(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(faults, "_faults", faults.parse("ENOSPC@history.write times=2"))
    writer = History(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.write(step=step)
    assert [r["step"] for r in history.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_torn_line_of_a_killed_writer_is_cut_off(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    for torn in ('{"event": "to', "x" * 200_000):
        path.write_text('{"event": "a"}\n' + torn)
        runfolder.record_event(tmp_path, "b")
        assert [e["event"] for e in runfolder.events(tmp_path)] == ["a", "b"]
    path.write_text(torn)
    runfolder.record_event(tmp_path, "c")
    assert [e["event"] for e in runfolder.events(tmp_path)] == ["c"]


def test_going_back_cuts_the_file_and_what_waits_and_the_open_history_goes_on(tmp_path, disk) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = History(path)
    for step in (1, 2, 2, 3):
        writer.write(step=step)
    disk["room"] = 0
    for step in (4, 5):
        writer.write(step=step)
    history.cut(path, 4)  # on the full disk
    history.cut(path, 4)
    assert [json.loads(line)["step"] for line in Lines._kept[path]] == [4]
    history.cut(path, 2)
    disk["room"] = 1 << 30
    writer.write(step=3)
    assert [r["step"] for r in history.read(path)] == [1, 2, 2, 3]


def test_a_torn_middle_is_cut_too(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    history.cut(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_replacing_a_file_on_a_full_disk_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch) -> None:
    files.write_text(tmp_path / "a", "old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
