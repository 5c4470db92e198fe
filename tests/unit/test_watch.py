"""submit, status, logs, cancel on stand-ins: what they print, refuse, and leave behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import cli, handles, ledger, standing
from launch.backends import torchrun
from launch.choices import choose
from tests.unit.fakes.torchrun import fake
from trainer import runfolder
from trainer.files import write_json
from trainer.guard.heartbeat import Heartbeat, path_of
from trainer.outcome import Outcome, RunError, write_outcome

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart.yaml")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Runs that only wait; what still lives at the end is ended."""
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    for name in handles.INSIDE:
        monkeypatch.delenv(name, raising=False)
    fake(tmp_path, monkeypatch)
    yield tmp_path
    for path in (tmp_path / "runs").glob(f"*/{handles.FILE}"):
        handle = json.loads(path.read_text())
        if torchrun.state(path.parent, handle)[0] == "running":
            os.kill(handle["pid"], signal.SIGKILL)


def orthogon(capsys, *arguments: str) -> tuple[int, str]:
    """One command in this process: exit code, and all that it prints."""
    capsys.readouterr()
    try:
        code = cli.dispatch(list(arguments))
    except RunError as error:
        code = error.outcome.code
        print(error)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def submitted(place: Path, capsys, name: str = "r") -> Path:
    code, text = orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", f"--name={name}", "--restarts", "1")
    assert code == 0, text
    folder = place / "runs" / name
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return folder


def attempt_of(folder: Path, number: int, outcome: Outcome | None) -> Path:
    logs = folder / f"logs/{number}"
    logs.mkdir()
    if outcome is not None:
        write_outcome(logs, outcome, "as told", step=7)
        told = json.loads((logs / "outcome.json").read_text())
        write_json(logs / "attempt.json", {**told, "attempt": number, "checkpoint": 5, "asked": True, "seconds": 2.0})
    return logs


def test_submit_returns_with_a_run_in_the_ledger_and_says_what_comes_next(place, capsys) -> None:
    code, text = orthogon(
        capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r", "--restarts=1", "--train.length=9 steps"
    )
    folder = place / "runs/r"
    assert code == 0
    assert f"run r is given to torchrun: {folder}" in text
    assert f"orthogon logs r --runs={place}/runs -f" in text
    handle = json.loads((folder / handles.FILE).read_text())
    assert (handle["backend"], handle["options"], handle["attempts"]) == ("torchrun", {"restarts": 1}, 0)
    assert os.getsid(handle["pid"]) == handle["pid"], "in a session of its own"
    row = ledger.refreshed()[0]
    assert (row["name"], row["state"], row["steps"], row["backend"]) == ("r", "starting", 9, "torchrun")
    code, text = orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r")
    assert (code, "there is a run r already" in text) == (78, True)
    code, text = orthogon(capsys, "resume", "r", f"--runs={place}/runs", "--on", "torchrun")
    assert (code, "is running already on torchrun" in text) == (78, True)
    assert "orthogon cancel r" in text
    code, text = orthogon(capsys, "resume", "r", f"--runs={place}/runs")
    assert (code, "is running already on torchrun" in text) == (78, True)
    assert len(ledger.refreshed()) == 1


SUBMIT = """
import sys
from launch import cli
from launch.backends import torchrun
from tests.unit.fakes.torchrun import WAITS
torchrun._line = lambda folder, options: [sys.executable, "-S", "-c", WAITS, str(folder)]
cli.main()
"""


def test_of_two_submits_at_once_one_wins(place) -> None:
    line = [sys.executable, "-c", SUBMIT, "submit", CONFIG, f"--runs={place}/runs", "--name=r"]
    children = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    said = [child.communicate(timeout=60)[0].decode() for child in children]
    assert sorted(child.returncode for child in children) == [0, 78, 78], said
    assert [row["state"] for row in ledger.refreshed()] == ["starting"]


def test_a_dry_run_shows_configuration_and_command_and_makes_nothing(place, capsys) -> None:
    code, text = orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r", "--dry-run", "--optim.lr=0.5")
    assert code == 0
    assert "lr: 0.5" in text
    assert "torch.distributed.run" in text
    assert not (place / "runs").exists()
    assert not (place / "state").exists()


BAD = [
    (["--on", "torchrum"], 78, "did you mean torchrun?"),
    (["--name=a b"], 78, "name"),
    (["--name=../x"], 78, "name"),
    (["--restart", "3"], 78, "did you mean --restarts?"),
    (["--restarts", "many"], 78, "restarts"),
    (["--cluster", "nowhere.yaml"], 78, "there is no file nowhere.yaml"),
    (["--cluster", "{place}/cluster.yaml"], 78, "cluster.yaml:2"),
    (["--after", "other", "--on", "torchrun"], 78, "cannot wait for other runs"),
    (["--runs=/proc/nowhere"], 78, "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_what_cannot_be_submitted_gets_a_sentence_and_leaves_nothing(place, capsys, arguments, code, words) -> None:
    (place / "cluster.yaml").write_text("# a cluster\nrestart: 3\n")
    given = [word.format(place=place) for word in arguments]
    found, text = orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r", *given)
    assert found == code, text
    assert words in text
    assert "Traceback" not in text
    assert not (place / "runs/r").exists()
    assert ledger.refreshed() == []


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 73), (errno.EDQUOT, 73), (errno.EROFS, 69)])
@pytest.mark.parametrize("where", ["run.json", handles.FILE])
def test_a_folder_that_cannot_be_written_leaves_no_run_no_process_and_an_exact_ledger(
    place, capsys, monkeypatch, number, code, where
) -> None:
    for module in (runfolder, handles):
        real = module.write_json

        def write(path: Path, value: object, real=real) -> None:
            if path.name == where:
                raise OSError(number, os.strerror(number))
            real(path, value)

        monkeypatch.setattr(module, "write_json", write)
    started: list[dict] = []
    submit = torchrun.submit
    monkeypatch.setattr(torchrun, "submit", lambda *a, **k: started.append(submit(*a, **k)) or started[-1])
    found, text = orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r")
    assert found == code, text
    assert os.strerror(number) in text
    assert all(torchrun.state(place / "runs/r", handle)[0] != "running" for handle in started)
    if code == 73 or where == "run.json":
        assert not (place / "runs/r").exists()
    assert [row["state"] for row in ledger.refreshed()] == []


def test_options_come_from_the_cluster_file_and_the_command_line_goes_first(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("restarts: 7\n")
    assert choose("torchrun", str(tmp_path / "c.yaml"), ["--optim.lr=1"]) == (
        "torchrun",
        torchrun.Options(restarts=7),
        ["--optim.lr=1"],
    )
    assert choose("torchrun", str(tmp_path / "c.yaml"), ["--restarts", "2"])[1].restarts == 2
    assert choose("torchrun", None, ["--restarts=2"])[1].restarts == 2


def test_status_tells_ranks_progress_and_time_left(place, capsys) -> None:
    folder = submitted(place, capsys)
    logs = attempt_of(folder, 1, None)
    for rank in (0, 1):
        Heartbeat(path_of(logs, rank)).beat("update", 30, 240)
    steps = [{"step": n, "loss": 3.0, "tokens_per_second": 1234.0, "seconds": 2.0} for n in range(1, 31)]
    lines = [*steps, {"step": 30, "validation_loss": 2.5, "validation_bits_per_byte": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text(
        '{"time": 1, "event": "planned", "steps": 90}\n{"time": 2, "event": "saved", "step": 30}\n'
    )
    code, text = orthogon(capsys, "status", "r", f"--runs={place}/runs")
    assert code == 0
    assert "run r: running" in text
    assert "step 30 of 90 (33.3%), loss 3.0000, 1,234 tokens/s, 2 min left" in text
    assert "last validation: loss 2.5000, 1.5000 bits per byte at step 30" in text
    assert "saved" in text
    assert [line.split()[:2] for line in text.splitlines() if "s ago  " in line] == [["0", "update"], ["1", "update"]]
    code, text = orthogon(capsys, "status", "r", "--json")  # found through the ledger
    facts = json.loads(text)
    assert (facts["state"], facts["seconds_left"], len(facts["ranks"])) == ("running", 120.0, 2)
    assert facts["next"] == f"orthogon logs r --runs={place}/runs -f"
    code, text = orthogon(capsys, "status", "s", f"--runs={place}/runs")
    assert (code, "there is no run s" in text, "runs there: r" in text) == (78, True, True)
    code, text = orthogon(capsys, "status", "../r")
    assert (code, "is no run name" in text) == (78, True)


def test_a_name_that_two_folders_have_needs_to_be_told_apart(place, capsys) -> None:
    for runs in ("a", "b"):
        folder = place / runs / "twin"
        (folder / "logs").mkdir(parents=True)
        (folder / "config.yaml").write_text("x: 1\n")
        ledger.remember(folder)
    code, text = orthogon(capsys, "status", "twin")
    assert (code, "there are 2 runs twin" in text) == (78, True)
    assert orthogon(capsys, "status", "twin", f"--runs={place}/a")[0] == 0


def test_logs_merge_ranks_and_follow_attempts_until_the_run_ends(place, capsys, monkeypatch) -> None:
    monkeypatch.setattr("launch.verbs.watch.POLL_SECONDS", 0.02)
    folder = submitted(place, capsys)
    first = attempt_of(folder, 1, None)
    (first / "rank-0.log").write_text("one\ntwo\nthree\n")
    (first / "rank-10.log").write_text("ten\nto")
    (first / "torchrun.log").write_text("agent\n")
    (folder / "logs/launcher.log").write_text("launched\n")
    code, text = orthogon(capsys, "logs", "r", f"--runs={place}/runs", "--lines", "2")
    assert text.splitlines() == [
        "[rank 0] two",
        "[rank 0] three",
        "[rank 10] ten",
        "[torchrun] agent",
        "[launcher] launched",
    ]
    assert orthogon(capsys, "logs", "r", "--rank=10")[1] == "[rank 10] ten\n"
    code, text = orthogon(capsys, "logs", "r", "--rank=3")
    assert (code, "has no log of rank 3" in text, "ranks: 0, 10" in text) == (78, True, True)
    code, text = orthogon(capsys, "logs", "r", "--attempt=4")
    assert (code, "has no attempt 4" in text) == (78, True)

    def goes_on() -> None:
        time.sleep(0.2)
        with open(first / "rank-10.log", "a") as file:
            file.write("rn\nlast\n")
        write_json(
            first / "attempt.json", {"outcome": "infrastructure", "message": "lost", "checkpoint": 0, "asked": False}
        )
        second = folder / "logs/2"
        second.mkdir()
        (second / "rank-0.log").write_text("again\n")
        time.sleep(0.3)
        attempt_of(folder, 3, Outcome.FINISHED)
        handle = json.loads((folder / handles.FILE).read_text())
        write_json(
            folder / "logs" / handles.LAST_WORD,
            {k: handle[k] for k in ("pid", "started", "host")} | {"exit_code": 0, "message": ""},
        )
        os.kill(handle["pid"], signal.SIGKILL)

    writer = threading.Thread(target=goes_on)
    writer.start()
    code, text = orthogon(capsys, "logs", "r", "-f", "--lines=0")
    writer.join()
    assert code == 0
    assert text.splitlines() == [
        "[rank 10] torn", "[rank 10] last", "--- attempt 2", "[rank 0] again", "--- attempt 3", "run r: finished: as told",
    ]  # fmt: skip
    assert orthogon(capsys, "logs", "r", "--attempt=1", "--rank=10", "--lines=1")[1] == "[rank 10] last\n"


def test_cancel_asks_waits_and_leaves_alone_what_does_not_run(place, capsys, monkeypatch) -> None:
    monkeypatch.setattr("launch.verbs.watch.POLL_SECONDS", 0.02)
    folder = submitted(place, capsys)
    attempt_of(folder, 1, None)
    code, text = orthogon(capsys, "cancel", "r", f"--runs={place}/runs", "--no-wait")
    assert (code, "asked run r" in text, "to save and end" in text) == (0, True, True)

    def saves() -> None:
        time.sleep(0.2)
        shutil.rmtree(folder / "logs/1")
        attempt_of(folder, 1, Outcome.PREEMPTED)
        os.kill(json.loads((folder / handles.FILE).read_text())["pid"], signal.SIGKILL)

    writer = threading.Thread(target=saves)
    writer.start()
    code, text = orthogon(capsys, "cancel", "r")
    writer.join()
    assert code == 0
    assert "run r has ended: preempted: as told" in text
    assert f"go on with: orthogon resume r --runs={place}/runs" in text
    code, text = orthogon(capsys, "cancel", "r")
    assert (code, "run r is not running: preempted" in text) == (0, True)
    assert ledger.refreshed()[0]["state"] == "preempted"


def test_cancel_now_kills_and_puts_it_on_record(place, capsys) -> None:
    folder = submitted(place, capsys)
    Heartbeat(path_of(attempt_of(folder, 1, None), 0)).beat("update", 7, 56)
    code, text = orthogon(capsys, "cancel", "r", "--now")
    assert (code, "killed run r" in text) == (0, True)
    record = json.loads((folder / "logs/1/attempt.json").read_text())
    assert (record["outcome"], record["asked"], record["ended"]) == ("infrastructure", True, "cancelled at once")
    one = standing.read(folder)
    assert (one.state, "cancelled at once" in one.note) == ("infrastructure", True)


def test_a_supervisor_that_is_cancelled_before_it_can_listen_has_lost_nothing(place, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torchrun, "_line", lambda folder, options: ["sleep", "60"])
    assert orthogon(capsys, "submit", CONFIG, f"--runs={place}/runs", "--name=r")[0] == 0
    code, text = orthogon(capsys, "cancel", "r")
    assert code == 0
    assert "run r has ended: failed: cancelled before its first attempt" in text


def test_a_run_of_no_backend_is_named_with_its_process(place, capsys) -> None:
    folder = place / "runs/r"
    (folder / "logs/1").mkdir(parents=True)
    (folder / "config.yaml").write_text("x: 1\n")
    Heartbeat(path_of(folder / "logs/1", 0)).beat("update", 3, 24)
    code, text = orthogon(capsys, "cancel", "r", f"--runs={place}/runs")
    assert (code, "was not given to a backend" in text) == (78, True)
