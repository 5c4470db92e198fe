"""Attempts follow each other as the policy says, and no process is left behind: real torchrun, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dist.conftest import calm_run
from launch import evidence
from trainer import config as configuration
from trainer import runfolder

ROOT = Path(__file__).parents[2]
LAUNCHER = "import launch.retry; launch.retry.FIRST_PAUSE = 0.2; from launch.cli import main; main()"
# In place of torchrun: a rank that ends as the trainer ends one with a bug.
BUG = """
import sys, traceback
from pathlib import Path
from trainer.outcome import Outcome, write_outcome
logs = Path(sys.argv[1]) / "logs" / sys.argv[2]
try:
    [][int(sys.argv[2])]
except IndexError as error:
    (logs / "rank-0.log").write_text(traceback.format_exc())
    write_outcome(logs, Outcome.BUG, f"rank 0: IndexError: {error} in attempt {sys.argv[2]}", rank=0)
sys.exit(1)
"""
WITH_BUG = """
import sys
from launch.backends import torchrun
torchrun.attempt_command = lambda config, folder, number: [sys.executable, "-c", BUG, str(folder), str(number)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "run.yaml").write_text(calm_run(folder))
    return folder


@pytest.fixture
def launcher() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `orthogon` with short pauses; what still lives at the end of the test is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, before: str = "") -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", before + LAUNCHER, *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def processes(folder: Path) -> dict[int, int | None]:
    """The processes of a run's attempts by pid, with the rank; None for torchrun."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() not in words or b"train" not in words:
                continue
            variables = dict(v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        found[int(entry.name)] = int(variables[b"RANK"]) if b"RANK" in variables else None
    return found


def wait_for(what: Callable[[], object], seconds: float = 90.0, alive: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert alive is None or alive.poll() is None, alive.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_is_followed_by_an_attempt_that_finishes_the_run(place, launcher) -> None:
    folder = place / "runs/killed"
    process = launcher("run", str(place / "run.yaml"), "--name=killed", "--train.length=30 steps", "--finish.export=false")
    wait_for(lambda: (folder / "checkpoints/step-00000004/manifest.json").exists(), alive=process)
    victim = next(pid for pid, rank in processes(folder).items() if rank == 1)
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    line = next(line for line in out.splitlines() if line.startswith("attempt 1 ended"))
    assert "attempt 2 starts in 1 s from step" in line
    assert "the checkpoint advanced to step" in line
    records = [json.loads((folder / f"logs/{n}/attempt.json").read_text()) for n in (1, 2)]
    assert records[1]["outcome"] == "finished"
    assert records[0]["checkpoint"] >= 4
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 31))
    assert processes(folder) == {}


def test_a_killed_launcher_leaves_no_process_and_a_saved_run(place, launcher) -> None:
    folder = place / "runs/orphans"
    process = launcher("run", str(place / "run.yaml"), "--name=orphans", "--train.length=100000 steps")
    history = folder / "metrics.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") > 2, alive=process)
    assert len(processes(folder)) == 3
    process.kill()
    wait_for(lambda: not processes(folder), 60)
    outcome = json.loads((folder / "logs/1/outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    assert (folder / f"checkpoints/step-{outcome['step']:08d}/manifest.json").exists()


def test_an_equal_bug_is_tried_three_times(place, launcher) -> None:
    runfolder.create(configuration.load(place / "run.yaml", ["--name=bug"]), [])
    process = launcher("resume", "bug", f"--runs={place}/runs", before=f"BUG = {BUG!r}{WITH_BUG}")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert out.count("seen 1 of 3 times") == 1
    assert out.count("seen 2 of 3 times") == 1
    assert "no further attempt: the same traceback came 3 times" in out
    assert evidence.attempts(place / "runs/bug") == [1, 2, 3]


def test_one_attempt_only_and_a_signal_before_the_first_step(place, launcher) -> None:
    folder = place / "runs/early"
    process = launcher("run", str(place / "run.yaml"), "--name=early", "--restarts=0")
    wait_for(lambda: None in processes(folder).values(), alive=process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    record = json.loads((folder / "logs/1/attempt.json").read_text())
    assert (process.returncode, record["outcome"], record["asked"]) == (75, "preempted", True), out
    assert not (folder / "logs/2").exists()
