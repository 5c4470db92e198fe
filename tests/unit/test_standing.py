"""What a run's state is called: a table of what its folder and its backend can say, and the run folders of the wild."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from launch import handles, standing
from launch.backends import torchrun
from trainer.guard.heartbeat import Beat, Heartbeat, path_of
from trainer.outcome import Outcome, RunError

NOW = 1000.0
FRESH = {0: Beat(1, 9, 7, 56, NOW - 1, "update", "", "h", NOW - 1)}
YOUNG = {0: Beat(1, 1, 0, 0, NOW - 1, "model", "", "h", NOW - 1)}
TOLD = {0: Beat(1, 9, 7, 56, NOW - 1, "save", "SIGTERM", "h", NOW - 1)}
STALE = {0: Beat(1, 9, 7, 56, NOW - 99, "update", "", "h", NOW - 60)}


def record(outcome: Outcome, **more: object) -> dict[str, object]:
    return {"outcome": outcome.value, "message": "so it was", **more}


TABLE = [
    # backend's word, outcome of the attempt, its heartbeats, whether there is one -> state, a word of the note
    ("pending", None, {}, False, "pending", "why it waits"),
    ("pending", record(Outcome.PREEMPTED), STALE, True, "pending", "why it waits"),
    ("running", None, {}, False, "starting", "detail"),
    ("running", None, YOUNG, True, "starting", "model"),
    ("running", None, FRESH, True, "running", ""),
    ("running", None, TOLD, True, "running", "SIGTERM came"),
    ("running", None, STALE, True, "running", "no sign of life for 60 s"),
    ("running", record(Outcome.INFRASTRUCTURE), STALE, True, "restarting", "so it was"),
    ("running", record(Outcome.FINISHED), FRESH, True, "finishing", "verified"),
    ("ended", record(Outcome.FINISHED), STALE, True, "finished", "so it was"),
    ("ended", record(Outcome.DIVERGED), STALE, True, "diverged", "so it was"),
    ("ended", record(Outcome.PREEMPTED), FRESH, True, "preempted", "so it was"),
    ("ended", None, {}, False, "failed", "detail"),
    ("ended", None, STALE, True, "lost", "killed"),
    ("vanished", None, {}, False, "lost", "detail"),
    ("vanished", None, FRESH, True, "running", "its launcher is gone"),
    ("vanished", record(Outcome.PREEMPTED), STALE, True, "lost", "so it was"),
    ("vanished", record(Outcome.INFRASTRUCTURE), STALE, True, "lost", "so it was"),
    ("vanished", record(Outcome.PREEMPTED, asked=True), STALE, True, "preempted", "so it was"),
    ("vanished", record(Outcome.FINISHED), STALE, True, "finished", "so it was"),
    ("unknown", None, FRESH, True, "running", ""),
    ("unknown", None, STALE, True, "unknown", "detail"),
    ("unknown", record(Outcome.PREEMPTED), STALE, True, "unknown", "preempted"),
    ("unknown", record(Outcome.FINISHED), STALE, True, "finished", "so it was"),
    ("none", None, {}, False, "new", "never started"),
    ("none", None, FRESH, True, "running", ""),
    ("none", None, STALE, True, "lost", "killed"),
    ("none", record(Outcome.PREEMPTED), STALE, True, "preempted", "so it was"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "outcome", "beats", "started", "state", "note"), TABLE)
def test_the_state_follows_from_backend_outcome_and_heartbeats(word, outcome, beats, started, state, note) -> None:
    detail = "why it waits" if word == "pending" else "detail"
    found, why = standing.judge((word, detail), outcome, beats, started, NOW)
    assert found == state
    assert note in why
    assert state in standing.ALIVE or state in standing.LASTING or state == "unknown"


def made(tmp_path: Path, name: str = "r") -> Path:
    folder = tmp_path / name
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  length: 40 steps\n")
    (folder / "run.json").write_text(
        json.dumps({"created": 5.0, "lineage": {"run": "old", "checkpoint": "step-00000005"}})
    )
    return folder


def test_a_folder_is_read_with_progress_and_lineage(tmp_path) -> None:
    folder = made(tmp_path)
    one = standing.read(folder)
    assert (one.state, one.step, one.steps, one.loss, one.attempts, one.backend) == ("new", 0, 40, None, 0, "-")
    assert one.lineage["branched_from"] == "old/step-00000005"
    lines = [{"step": n, "loss": 5 - n / 10, "tokens_per_second": 100.0} for n in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "validation_loss": 9.0}])
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    (folder / "events.jsonl").write_text(
        '{"event": "planned", "steps": 44}\n{"event": "resumed", "step": 2}\n{"event": "saved"}\n'
    )
    one = standing.read(folder)
    assert (one.step, one.steps, one.loss, one.tokens_per_second) == (3, 44, 4.7, 100.0)
    assert one.lineage["resumed_from"] == "step 2"


def test_an_attempt_of_before_says_nothing_of_a_new_handle(tmp_path) -> None:
    folder = made(tmp_path)
    (folder / "logs/1").mkdir()
    (folder / "logs/1/attempt.json").write_text(json.dumps(record(Outcome.FINISHED, attempt=1)))
    assert standing.read(folder).state == "finished"
    handle = {"backend": "torchrun", "attempts": 1, **handles.identity()}
    (folder / handles.FILE).write_text(json.dumps(handle))
    assert standing.read(folder).state == "starting"
    (folder / handles.FILE).write_text(json.dumps(handle | {"started": 1}))
    assert standing.read(folder).state == "lost"
    (folder / handles.FILE).write_text(json.dumps(handle | {"host": "elsewhere"}))
    one = standing.read(folder)
    assert (one.state, "elsewhere" in one.note) == ("unknown", True)
    (folder / handles.FILE).write_text(json.dumps(handle | {"backend": "gone"}))
    one = standing.read(folder)
    assert (one.state, one.note) == ("unknown", "there is no backend 'gone'")
    (folder / handles.FILE).write_text("{torn")
    assert standing.read(folder).state == "finished"


def test_running_needs_signs_of_life_and_a_dead_supervisor_is_lost_with_its_last_words(tmp_path) -> None:
    folder = made(tmp_path)
    (folder / "logs/1").mkdir()
    handle = {"backend": "torchrun", "attempts": 0, **handles.identity(), "started": 1}
    (folder / handles.FILE).write_text(json.dumps(handle))
    heart = Heartbeat(path_of(folder / "logs/1", 0))
    heart.beat("update", 5, 40)
    one = standing.read(folder)
    assert (one.state, one.note) == ("running", "its launcher is gone")
    (folder / "logs/1/heartbeat-0").unlink()
    (folder / "logs" / torchrun.LOG).write_text("error: the disk is gone\n")
    one = standing.read(folder)
    assert (one.state, "error: the disk is gone" in one.note) == ("lost", True)


def test_a_supervisor_whose_driver_was_killed_before_it_wrote_the_handle_writes_it(tmp_path, monkeypatch) -> None:
    for name in handles.INSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(handles.SUBMITTED, "1")
    folder, seen = made(tmp_path), []

    def work() -> int:
        handle = json.loads((folder / handles.FILE).read_text())
        seen.append((handle["options"], handle.get("foreground"), standing.read(folder).state))
        return 0

    assert handles.supervised(folder, {"restarts": 3}, work) == 0
    assert seen == [({"restarts": 3}, None, "starting")]
    kept = json.loads((folder / handles.FILE).read_text()) | {"options": {"restarts": 9}}
    (folder / handles.FILE).write_text(json.dumps(kept))
    assert handles.supervised(folder, {"restarts": 3}, lambda: 0) == 0
    assert json.loads((folder / handles.FILE).read_text()) == kept, "that of the driver, which was there, is kept"
    other = subprocess.Popen(["sleep", "60"])
    try:  # the next driver has started another one meanwhile
        (folder / handles.FILE).write_text(json.dumps(kept | handles.identity(other.pid)))
        with pytest.raises(RunError, match="is running already on torchrun"):
            handles.supervised(folder, {}, lambda: pytest.fail("two supervisors of one run"))
    finally:
        other.kill()
        other.wait()


def test_a_run_that_its_backend_refused_is_withdrawn_unless_somebody_has_taken_it(tmp_path, monkeypatch) -> None:
    folder = made(tmp_path)
    with open(folder / handles.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        handles.withdraw(folder)
    (folder / handles.LOCK).unlink()
    assert folder.exists(), "another process gives it to a backend"
    (folder / handles.FILE).write_text('{"backend": "torchrun"}')
    handles.withdraw(folder)
    (folder / handles.FILE).unlink()
    (folder / "logs/1").mkdir(parents=True)
    handles.withdraw(folder)
    assert folder.exists(), "it has a handle, or an attempt"
    (folder / "logs/1").rmdir()
    handles.withdraw(folder)
    assert not folder.exists()
    folder = made(tmp_path / "full")

    def full(*_given: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(handles, "open", full, raising=False)
    handles.withdraw(folder)
    assert not folder.exists(), "nobody else could take it either"


def test_in_a_job_of_a_queue_a_run_of_a_supervisor_on_this_machine_is_taken(tmp_path, monkeypatch) -> None:
    for name in handles.INSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = made(tmp_path)
    other = subprocess.Popen(["sleep", "60"])
    try:
        (folder / handles.FILE).write_text(json.dumps({"backend": "torchrun", **handles.identity(other.pid)}))
        with pytest.raises(RunError, match="is running already on torchrun"):
            handles.check_free(folder, handles.identity())
    finally:
        other.kill()
        other.wait()


def test_a_supervisor_leaves_its_handle_and_its_last_word_also_where_it_fails(tmp_path, monkeypatch) -> None:
    for name in handles.INSIDE:
        monkeypatch.delenv(name, raising=False)
    folder = made(tmp_path)
    seen = []

    def work() -> int:
        seen.append(standing.read(folder).state)
        with pytest.raises(RunError, match="is running already on torchrun"):
            handles.check_free(folder)
        handles.check_free(folder, handles.identity())
        return 65

    assert handles.supervised(folder, {}, work) == 65
    assert seen == ["starting"]
    one = standing.read(folder)  # this process lives on: the handle does, too
    assert one.state == "starting"
    word = json.loads((folder / "logs" / handles.LAST_WORD).read_text())
    assert (word["exit_code"], word["message"]) == (65, "")

    def fail() -> int:
        raise RunError("no room", outcome=Outcome.NO_SPACE)

    with pytest.raises(RunError):
        handles.supervised(folder, {}, fail)
    word = json.loads((folder / "logs" / handles.LAST_WORD).read_text())
    assert (word["exit_code"], word["message"]) == (73, "no room")
    dead = json.loads((folder / handles.FILE).read_text()) | {"pid": 2**22 + 5}
    (folder / handles.FILE).write_text(json.dumps(dead))
    (folder / "logs" / handles.LAST_WORD).write_text(json.dumps(word | {"pid": 2**22 + 5}))
    one = standing.read(folder)
    assert (one.state, one.note) == ("failed", "no room")
