"""A run in the background from submit to its end: real torchrun, real signals, a supervisor that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import handles, standing
from launch.backends import torchrun
from tests.dist.conftest import calm_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "run.yaml").write_text(calm_run(folder, ranks=1) + "finish: {export: false}\n")
    yield folder
    for path in (folder / "runs").glob(f"*/{handles.FILE}"):
        handle = json.loads(path.read_text())
        if handle["backend"] == "torchrun" and torchrun.state(path.parent, handle)[0] == "running":
            os.kill(handle["pid"], signal.SIGTERM)


def orthogon(*arguments: str) -> tuple[int, str]:
    line = [sys.executable, "-m", "launch.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


def rows(name: str, place: Path) -> list[dict[str, Any]]:
    """What the list says of a run; the ledger knows those of other tests, too."""
    listed: list[dict[str, Any]] = json.loads(orthogon("list", "--json")[1])
    return [row for row in listed if row["name"] == name and row["folder"].startswith(str(place))]


def wait_for(what: Callable[[], object], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_submit_lose_resume_watch_cancel_and_finish(place) -> None:
    runs, folder = f"--runs={place}/runs", place / "runs/bg"
    history = folder / "metrics.jsonl"
    steps = lambda: history.read_text().count('"loss"') if history.exists() else 0  # noqa: E731
    code, text = orthogon("submit", str(place / "run.yaml"), "--name=bg", "--train.length=100000 steps")
    assert code == 0, text
    assert f"orthogon logs bg {runs} -f" in text

    # The supervisor is killed: what it started leaves, and nobody starts it again.
    wait_for(lambda: (folder / "logs/1/torchrun.log").exists())
    os.kill(json.loads((folder / handles.FILE).read_text())["pid"], signal.SIGKILL)
    wait_for(lambda: standing.read(folder).state == "lost")
    code, text = orthogon("status", "bg", runs)
    assert "run bg: lost: its launcher, pid" in text
    assert f"orthogon resume bg {runs} --on torchrun" in text

    code, text = orthogon("resume", "bg", runs, "--on", "torchrun")
    assert code == 0, text
    follower = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "logs", "bg", runs, "-f"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    wait_for(lambda: steps() > 2)
    listed = rows("bg", place)
    assert [(row["name"], row["state"], row["steps"], row["attempts"]) for row in listed] == [("bg", "running", 100000, 2)]
    facts = json.loads(orthogon("status", "bg", "--json")[1])
    assert [rank["rank"] for rank in facts["ranks"]] == [0]
    code, text = orthogon("cancel", "bg", runs)
    assert code == 0
    assert "run bg has ended: preempted: a signal came; saved at step" in text
    record = json.loads((folder / "logs/2/attempt.json").read_text())
    assert (record["outcome"], record["asked"]) == ("preempted", True)
    assert (folder / f"checkpoints/step-{record['step']:08d}/manifest.json").exists()
    assert json.loads((folder / "logs" / handles.LAST_WORD).read_text())["exit_code"] == 75
    followed, _ = follower.communicate(timeout=60)
    assert re.search(r"^\[launcher\] step +1/100000  loss", followed, re.M)
    assert followed.splitlines()[-1].startswith("run bg: preempted: a signal came")

    code, text = orthogon("resume", "bg", runs, f"--train.length={record['step'] + 3} steps", "--on", "torchrun")
    assert code == 0, text
    wait_for(lambda: standing.read(folder).state == "finished")
    assert json.loads((folder / "logs" / handles.LAST_WORD).read_text())["exit_code"] == 0
    done = [json.loads(line)["step"] for line in history.read_text().splitlines() if '"loss"' in line]
    assert done == list(range(1, record["step"] + 4))
    listed = rows("bg", place)
    assert [(row["state"], row["step"], row["attempts"]) for row in listed] == [("finished", record["step"] + 3, 3)]
    assert listed[0]["resumed_from"] == f"step {record['step']}"


@pytest.mark.timeout(600)
def test_a_graph_of_two_runs_at_once_and_what_comes_after_them(place) -> None:
    """The corpus is prepared once, by the test above or by one of the two."""
    (place / "graph.yaml").write_text(
        f"runs: {place}/runs\n"
        "nodes:\n"
        '  one: {config: run.yaml, set: {train: {length: "2 steps"}}}\n'
        '  two: {config: run.yaml, set: {seed: 1, train: {length: "2 steps"}}}\n'
        f"  compare: {{command: [orthogon, diff, one, two, --runs={place}/runs, --json], after: [one, two]}}\n"
    )
    code, text = orthogon("pipeline", str(place / "graph.yaml"), "--at-once", "2")
    assert code == 0, text
    lines = text.splitlines()
    assert lines[:2] == ["one: started on torchrun", "two: started on torchrun"]
    assert lines[-1] == "compare: finished (3 of 3)"
    compared = json.loads((place / "runs/pipelines/graph/compare.log").read_text())
    assert compared["first_difference"]["step"] == 1
    code, text = orthogon("pipeline", str(place / "graph.yaml"))
    assert text.splitlines() == ["one: done before", "two: done before", "compare: done before"]


KILLED = """
import os
from launch import cli, handles
handles.write_json = lambda path, value: os._exit(9)
cli.main()
"""


def test_a_submit_that_is_killed_before_it_wrote_the_handle_has_started_one_run(place) -> None:
    runs, folder = f"--runs={place}/runs", place / "runs/early"
    line = [sys.executable, "-c", KILLED, "submit", str(place / "run.yaml"), "--name=early", "--train.length=100000 steps"]
    assert subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, timeout=60).returncode == 9
    wait_for(lambda: handles.read(folder) is not None, 60)  # its supervisor says that it is there
    assert standing.read(folder).alive
    code, text = orthogon("resume", "early", runs, "--on", "torchrun")
    assert (code, "is running already on torchrun" in text) == (78, True), text
    code, text = orthogon("cancel", "early", runs, "--now")
    assert code == 0, text
    assert not standing.read(folder).alive
