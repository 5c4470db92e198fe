"""Reports on made-up log folders: one for each way in which a run can stop."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from launch import attempt
from launch.report import report
from launch.verbs.report import show
from trainer.checkpoint import manifest as manifests
from trainer.guard.heartbeat import Heartbeat, path_of
from trainer.outcome import Outcome, RunError, write_outcome

NOW = 1_800_000_000.0
TABLE = """\
E1125 00:47:55 8824 api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 8864) of binary: python
============================================================
trainer FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_00:47:55
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 69 (pid: 8863)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_00:47:46
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 8864)  ({name})
  error_file: <N/A>
  traceback : Signal {name} received by PID 8864
============================================================
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a checkpoint of step 15 and one attempt that has left nothing."""
    folder = tmp_path / "r"
    (folder / "logs/1").mkdir(parents=True)
    generation = folder / "checkpoints" / manifests.name(15)
    generation.mkdir(parents=True)
    manifest = manifests.Manifest(step=15, position=120, world_size=2, files={}, tensors={}, config={}, state={})
    manifests.write(generation, manifest)
    return folder


def beat(run: Path, rank: int, phase: str, step: int, alive: float, beats: int = 50, number: int = 1) -> None:
    path = path_of(run / f"logs/{number}", rank)
    heart = Heartbeat(path)
    heart.beats = beats - 1
    heart.beat(phase, step, step * 8)
    data = bytearray(path.read_bytes())
    struct.pack_into("<d", data, 192, alive)
    path.write_bytes(data)


def hang(
    run: Path, rank: int, *, waiting: bool, why: str = "no progress", frame: str = "trainer/loop.py:31 train"
) -> None:
    note = {
        "rank": rank,
        "phase": "step",
        "step": 20,
        "seconds": 600,
        "why": why,
        "waiting": waiting,
        "frame": frame,
        "time": NOW,
    }
    (run / f"logs/1/hang-rank-{rank}.json").write_text(json.dumps(note))


def told(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    found = report(run, Path("runs"), now=NOW)
    json.dumps(found)
    show(found)
    return found, capsys.readouterr().out


def test_a_rank_killed_by_a_signal_is_named_with_it_and_its_phase(run, capsys) -> None:
    beat(run, 0, "step", 21, NOW - 100)
    beat(run, 1, "save", 21, NOW - 102)
    write_outcome(run / "logs/1", Outcome.INFRASTRUCTURE, "rank 0: connection reset by peer", rank=0)
    (run / "logs/1/torchrun.log").write_text(TABLE.format(code=-9, name="SIGKILL"))
    attempt.close(run, 1, False, NOW - 300, "")
    found, text = told(run, capsys)
    assert found["first"] == {"rank": 1, "what": "rank 1 was killed by SIGKILL", "phase": "save, after step 21"}
    assert (found["outcome"], found["checkpoint"], found["step"], found["lost_steps"]) == (
        "infrastructure", "step-00000015", 21, 6,
    )  # fmt: skip
    assert "6 steps are lost" in text
    assert "torchrun: rank 1 left with SIGKILL, first on its node" in text
    assert "go on with: orthogon resume r" in text


def test_a_segmentation_fault_without_any_outcome(run, capsys) -> None:
    (run / "logs/1/torchrun.log").write_text(TABLE.format(code=-11, name="SIGSEGV"))
    found, _ = told(run, capsys)
    assert found["message"] == "rank 1 was killed by SIGSEGV"
    assert found["first"]["phase"] == "unknown"


def test_torchrun_that_was_ended_itself_names_the_rank_in_one_line(run, capsys) -> None:
    (run / "logs/1/torchrun.log").write_text(TABLE.format(code=-9, name="SIGKILL").splitlines()[0])
    assert told(run, capsys)[0]["first"]["rank"] == 1


def test_a_bug_is_shown_with_the_traceback_of_its_rank(run, capsys) -> None:
    beat(run, 1, "validate", 20, NOW - 100)
    (run / "logs/1/rank-1.log").write_text(
        'noise\nTraceback (most recent call last):\n  File "x.py", line 3, in f\nKeyError: 1\nmore\n'
    )
    write_outcome(run / "logs/1", Outcome.BUG, "rank 1: KeyError: 1", rank=1)
    found, text = told(run, capsys)
    assert found["first"]["rank"] == 1
    assert '  File "x.py", line 3, in f' in text
    assert "KeyError: 1\nmore" not in text
    assert found["next"] == "mend it, then orthogon resume r"


def test_in_a_hang_the_stopped_rank_comes_first(run, capsys) -> None:
    beat(run, 0, "step", 20, NOW - 100, beats=10)
    beat(run, 1, "step", 20, NOW - 700, beats=90)
    hang(run, 0, waiting=False)
    found, _ = told(run, capsys)
    assert found["outcome"] == "infrastructure"
    assert found["first"]["rank"] == 1
    assert "stopped or dead" in found["first"]["what"]


def test_in_a_hang_the_rank_that_did_not_wait_comes_second(run, capsys) -> None:
    beat(run, 0, "step", 20, NOW - 100, beats=10)
    beat(run, 1, "data", 20, NOW - 100, beats=90)
    hang(run, 0, waiting=True)
    hang(run, 1, waiting=False, frame="trainer/data/table.py:7 read")
    found, text = told(run, capsys)
    assert (
        found["first"]["what"] == "rank 1 was at trainer/data/table.py:7 read while the others waited in a collective"
    )
    assert found["first"]["phase"] == "data, after step 20"
    assert "rank 0's watchdog: no progress for 600 s in phase 'step', waiting in a collective" in text


def test_in_a_hang_the_rank_with_the_fewest_beats_comes_third(run, capsys) -> None:
    for rank, beats in ((0, 90), (1, 88), (2, 90)):
        beat(run, rank, "step", 20, NOW - 100, beats=beats)
        hang(run, rank, waiting=True)
    assert told(run, capsys)[0]["first"]["what"] == "rank 1 was behind the others, in phase 'step'"


def test_nobody_is_named_where_nothing_tells(run, capsys) -> None:
    for rank in (0, 1):
        beat(run, rank, "step", 20, NOW - 100)
        hang(run, rank, waiting=True)
    found, text = told(run, capsys)
    assert found["first"] is None
    assert "first: unknown" in text


def test_ranks_whose_torchrun_died_name_it(run, capsys) -> None:
    beat(run, 0, "step", 20, NOW - 100)
    hang(run, 0, waiting=True, why="parent is gone")
    found, text = told(run, capsys)
    assert found["message"] == "torchrun was killed"
    assert found["first"]["rank"] is None
    assert "rank 0 noticed and left" in text


def test_a_living_run_is_running_with_a_phase_per_rank(run, capsys) -> None:
    beat(run, 0, "step", 20, NOW - 0.3)
    beat(run, 1, "save", 20, NOW - 0.4)
    found, text = told(run, capsys)
    assert (found["outcome"], found["next"]) == ("running", None)
    assert [one["phase"] for one in found["ranks"]] == ["step", "save"]
    assert "lost" not in text


def test_an_attempt_without_any_trace_is_unknown(run, capsys) -> None:
    found, text = told(run, capsys)
    assert found["outcome"] == "unknown"
    assert "first: unknown" in text


def test_a_lost_node_is_evidence(run, capsys) -> None:
    beat(run, 0, "step", 20, NOW - 100)
    attempt.close(run, 1, False, NOW - 300, "node n2 is gone")
    found, _ = told(run, capsys)
    assert "node n2 is gone" in found["message"]
    assert "the launcher ended torchrun: node n2 is gone" in found["evidence"]
    assert found["first"]["what"].startswith("node n2 is gone")


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome.FINISHED, None),
        (Outcome.PREEMPTED, "orthogon resume r"),
        (Outcome.DIVERGED, "branch r"),
        (Outcome.OUT_OF_DATA, "--data.max_epochs"),
        (Outcome.NO_SPACE, "make room"),
        (Outcome.BAD_CONFIGURATION, "mend it"),
    ],
)
def test_each_other_end_says_what_to_do(run, capsys, outcome, words) -> None:
    write_outcome(run / "logs/1", outcome, "error: so it is\nwhere: here", rank=0, step=20)
    found, text = told(run, capsys)
    assert found["outcome"] == outcome.value
    assert (found["next"] is None) == (words is None)
    assert words is None or words in found["next"]
    assert outcome.value in text.splitlines()[-1 if words is None else -3]


def test_the_table_lists_all_attempts_and_an_older_one_can_be_asked_for(run) -> None:
    write_outcome(run / "logs/1", Outcome.PREEMPTED, "a signal came; saved at step 15", step=15)
    attempt.close(run, 1, False, NOW - 60, "")
    (run / "logs/2").mkdir()
    beat(run, 0, "step", 16, NOW, number=2)
    rows = report(run, Path("runs"), now=NOW)["attempts"]
    assert [(row["attempt"], row["outcome"], row["step"], row["checkpoint"]) for row in rows] == [
        (1, "preempted", 15, 15), (2, "running", 16, None),
    ]  # fmt: skip
    assert report(run, Path("runs"), 1, now=NOW)["outcome"] == "preempted"
    with pytest.raises(RunError, match="no attempt 3"):
        report(run, Path("runs"), 3)


def test_a_damaged_newest_checkpoint_does_not_count(run) -> None:
    torn = run / "checkpoints" / manifests.name(20)
    torn.mkdir()
    manifest = manifests.Manifest(
        step=20, position=160, world_size=1, files={"a": {"size": 9, "sha256": ""}}, tensors={}, config={}, state={}
    )
    manifests.write(torn, manifest)
    (torn / "a").write_bytes(b"short")
    assert report(run, Path("runs"), now=NOW)["checkpoint"] == "step-00000015"
