"""Runs that a warm process forks: bit for bit those of torchrun, and as safe when something is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import children, evidence, handles, standing, warm
from launch.backends import torchrun
from tests.dist.conftest import calm_run
from tests.dist.test_cli import ROOT, finished
from trainer import config as configuration
from trainer import runfolder

LONG = "--train.length=100000 steps"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "run.yaml").write_text(calm_run(folder, ranks=1) + "finish: {export: false}\n")
    return folder


@pytest.fixture(scope="module")
def keeper() -> Iterator[warm.Keeper]:
    with warm.kept(True):
        assert warm._keeper is not None
        yield warm._keeper


def begin(place: Path, name: str, *overrides: str) -> Path:
    """A run in the background, as a pipeline starts it."""
    config = configuration.load(place / "run.yaml", [f"--name={name}", *overrides])
    runfolder.create(config, [])
    handles.start(config, config.folder, "torchrun", torchrun.Options(), resume=False)
    return config.folder


def until(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def rank_of(folder: Path) -> int:
    """The only process below the supervisor: its rank."""
    supervisor = until(lambda: handles.read(folder))["pid"]
    until(lambda: evidence.steps_done(folder / "logs" / str(evidence.newest_attempt(folder))) > 6)
    (rank,) = children.descendants(supervisor)
    assert is_fork(rank)
    return rank


def gone(pid: int) -> bool:
    """Whether a process has ended, collected or not: orphans may be left to a process that waits for nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def is_fork(pid: int) -> bool:
    return b"launch.warm" in Path(f"/proc/{pid}/cmdline").read_bytes()


def ended(folder: Path) -> str:
    until(lambda: not standing.read(folder).alive)
    return standing.read(folder).state


def test_a_forked_run_is_bit_for_bit_that_of_torchrun(place, keeper) -> None:
    folder = begin(place, "forked")
    assert is_fork(handles.read(folder)["pid"])
    assert ended(folder) == "finished"
    code, text = finished("run", str(place / "run.yaml"), "--name=started")
    assert code == 0, text
    saved = [sorted((place / "runs" / name).glob("checkpoints/step-00000020/*.safetensors")) for name in ("forked", "started")]
    assert len(saved[0]) == len(saved[1]) == 1
    one, other = (load_file(files[0]) for files in saved)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (folder / "figures/loss.png").stat().st_size > 5000  # what follows a run followed it
    assert not (folder / "logs/1/torchrun.log").read_text()


def test_a_killed_rank_is_named_and_followed_by_another_attempt(place, keeper) -> None:
    folder = begin(place, "killed", "--train.length=300 steps", "--checkpoint.every=100 steps")
    os.kill(rank_of(folder), signal.SIGKILL)
    assert ended(folder) == "finished"
    assert evidence.record(folder / "logs/1/attempt.json")["message"] == "rank 0 was killed by SIGKILL"
    assert evidence.newest_attempt(folder) == 2


def test_a_run_that_is_cancelled_saves_and_goes_on(place, keeper) -> None:
    folder = begin(place, "asked", LONG)
    rank = rank_of(folder)
    torchrun.cancel(folder, handles.read(folder), now=False)
    assert ended(folder) == "preempted"
    outcome = evidence.told(folder / "logs/1")
    assert evidence.newest_checkpoint(folder) == outcome["step"] > 6
    assert gone(rank)
    config = runfolder.open_run(folder, [f"--train.length={outcome['step'] + 2} steps"])
    runfolder.write_config(folder, config)
    handles.start(config, folder, "torchrun", torchrun.Options(), resume=True)
    assert ended(folder) == "finished"
    assert f"resumed from step-{outcome['step']:08d}" in (folder / "logs/launcher.log").read_text()


def test_a_run_whose_supervisor_is_killed_saves_and_leaves_no_process(place, keeper) -> None:
    folder = begin(place, "orphan", LONG, "--checkpoint.every=100000 steps")
    rank = rank_of(folder)
    os.kill(handles.read(folder)["pid"], signal.SIGKILL)
    until(lambda: gone(rank))
    assert not standing.read(folder).alive
    outcome = evidence.told(folder / "logs/1")
    assert (outcome["outcome"], outcome["step"]) == ("preempted", evidence.newest_checkpoint(folder))


DEAF = """
import os, signal, sys, time
from pathlib import Path
from launch import attempt, children
folder = Path(sys.argv[1])
def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, children.FORWARDED)
    (folder / "deaf").touch()
    time.sleep(600)
with children.Asked() as asked, open(folder / "torchrun.log", "w") as log:
    child = children.Forked(deaf, log, os.environ, children.default_signals)
    while not (folder / "deaf").exists():
        time.sleep(0.01)
    asked.signal = signal.SIGTERM
    print(attempt.watch(child, folder, "torchrun.log", asked, patience=0.5), child.returncode)
"""


def test_a_rank_that_does_not_answer_a_signal_is_ended(tmp_path) -> None:
    """In a process of its own: a launcher ends all that is below it."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"it outlived a signal {-signal.SIGKILL}\n"
    assert time.monotonic() - began < 30


def test_commands_give_their_output_and_exit_code(keeper, place, tmp_path) -> None:
    done = warm.command(["evaluate", "forked", f"--runs={place}/runs", "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    assert '"loss"' in done.stdout
    done = warm.command(["evaluate", "nobody", f"--runs={tmp_path}"])
    assert (done.returncode, done.stdout) == (78, "")
    assert "nobody" in done.stderr


def test_what_a_driver_started_outlives_it_and_the_warm_process_does_not(place) -> None:
    (place / "grid.yaml").write_text((place / "run.yaml").read_text().replace("name: tiny", "name: grid"))
    words = ["tune", str(place / "grid.yaml"), "--method=grid", "--epochs", "1000", "--lr", "0.01", "0.02", "--weight-decay", "0.1",
             "--most-epochs=1000", "--at-once=2"]  # fmt: skip
    driver = subprocess.Popen([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (warm_process,) = until(lambda: children.descendants(driver.pid), 20)
    folders = until(lambda: len(found := list((place / "runs").glob("grid-*"))) == 2 and found)
    ranks = [rank_of(folder) for folder in folders]
    driver.kill()
    driver.communicate()
    until(lambda: gone(warm_process))
    for folder, rank in zip(folders, ranks, strict=True):
        assert not gone(rank)
        torchrun.cancel(folder, handles.read(folder), now=True)
        assert not standing.read(folder).alive


def test_without_the_warm_process_runs_start_by_themselves_and_that_is_told(place, capfd) -> None:
    with warm.kept(True):
        keeper = warm._keeper
        keeper._child.kill()
        folder = begin(place, "cold", LONG)
        assert "the warm process is gone" in capfd.readouterr().err
        assert warm._keeper is None
        assert not is_fork(handles.read(folder)["pid"])
        until(lambda: evidence.steps_done(folder / "logs/1") > 6)
        torchrun.cancel(folder, handles.read(folder), now=True)
