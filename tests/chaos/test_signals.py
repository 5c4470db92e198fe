"""Signals to the launcher and to torchrun, a window that is too short for the save, a second job on one run folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launch import children
from tests.chaos import harness
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged

STEPS = 100_000
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return harness.place(tmp_path_factory.mktemp("signals"), STEPS)


def agent(running: harness.Running) -> int:
    """torchrun's process: below the launcher, and no rank."""
    ranks = {beat.pid for beat in running.beats(1).values()}
    return next(pid for pid in children.descendants(running.process.pid) if pid not in ranks)


@pytest.mark.parametrize("target", ["torchrun", "launcher twice", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_from_outside_ends_in_a_checkpoint(place, target, number) -> None:
    if target == "terminal" and number is not signal.SIGINT:
        pytest.skip("a terminal sends SIGINT")
    name = f"{target.split()[0]}-{number.name}"
    running = harness.Running(place, name, "--restarts=0")
    running.trains(step=3)
    if target == "torchrun":
        os.kill(agent(running), number)
    elif target == "terminal":
        os.killpg(running.process.pid, number)
    else:
        running.process.send_signal(number)
        running.process.send_signal(number)
    code, text = running.ends(100)
    assert code == 75, text
    outcome = json.loads((running.folder / "logs/1/outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"] >= 3) == ("preempted", True)
    newest = manifests.generations(running.folder / "checkpoints")[0]
    assert manifests.verify(newest).step == outcome["step"]


def test_a_window_that_is_too_short_costs_the_save_and_nothing_before_it(place) -> None:
    """The save takes longer than torchrun gives the ranks: they are killed in it, and the checkpoint before stays."""
    faults = "term@step.border rank=1 step=5; sleep=120@save.write rank=0 step=6"
    running = harness.Running(place, "short", "--restarts=0", "--guard.stop_timeout=2s", faults=faults)
    running.trains(step=5)
    os.kill(agent(running), signal.SIGTERM)
    code, text = running.ends(150)
    assert code == 69, text
    newest = manifests.generations(running.folder / "checkpoints")[0]
    assert manifests.verify(newest).step == 4
    assert harness.Running(place, "short", "--train.length=7 steps", verb="resume").ends(150)[0] == 0


def test_a_second_job_is_refused_with_the_name_of_the_first(place) -> None:
    running = harness.Running(place, "mine", "--restarts=0")
    running.trains(step=1)
    before = (running.folder / "config.yaml").read_text()
    code, text = harness.Running(place, "mine", "--optim.lr=9", verb="resume").second()
    assert code == 78, text
    pids = [str(beat.pid) for beat in running.beats(1).values()]
    assert "is being written by pid" in text
    assert any(f"pid {pid} " in text for pid in pids)
    assert (running.folder / "config.yaml").read_text() == before
    running.process.send_signal(signal.SIGTERM)
    assert running.ends(100)[0] == 75


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing shard", "no manifest"])
def test_a_resume_names_the_damage_and_takes_the_checkpoint_before(place, harm) -> None:
    name = f"damaged-{harm.split()[0]}"
    running = harness.Running(place, name, "--train.length=6 steps")
    assert running.ends(200)[0] == 0
    newest = running.folder / "checkpoints/step-00000006"
    shard = sorted(newest.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    if harm == "truncated":
        shard.write_bytes(data[:-1])
    elif harm == "flipped":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "missing shard":
        shard.unlink()
    else:
        (newest / "manifest.json").unlink()
    with pytest.raises(Damaged):
        manifests.verify(newest)
    code, text = harness.Running(place, name, "--train.length=8 steps", verb="resume").ends(200)
    assert code == 0, text
    assert "step-00000006 is damaged" in text
    assert ("manifest.json" if harm == "no manifest" else shard.name) in text
    assert "resumed from step-00000004" in text
    assert (running.folder / "checkpoints/quarantine/step-00000006/reason.txt").exists()
