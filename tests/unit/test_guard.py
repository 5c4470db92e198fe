"""Faults are parsed or refused; a heartbeat survives its writer; spikes are told from noise."""

from __future__ import annotations

import errno
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.guard import faults, heartbeat
from trainer.guard.options import GuardConfig
from trainer.guard.spikes import SpikeDetector

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def disarmed():
    yield
    faults.arm("")
    faults._here.clear()


def test_a_fault_strikes_where_it_was_asked_for_and_as_often() -> None:
    faults.arm("ENOSPC@save.write rank=1 step=20; nan@step.loss attempt=2 times=2")
    faults.locate(rank=1, step=19, attempt=1)
    assert faults.fault("save.write") == 1.0
    assert faults.fault("step.loss") == 1.0
    faults.locate(step=20, attempt=2)
    with pytest.raises(OSError, match="on purpose") as raised:
        faults.fault("save.write")
    assert raised.value.errno == errno.ENOSPC
    assert faults.fault("save.write") == 1.0
    assert [math.isnan(faults.fault("step.loss")) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "text", ["kill@nowhere", "kil@save.write", "sleep@save.write", "kill@save.write node=1", "ENOSUCH@save.write"]
)
def test_a_fault_that_cannot_be_is_refused(text) -> None:
    with pytest.raises(ValueError, match="ORTHOGON_FAULTS"):
        faults.parse(text)


def test_every_point_is_in_the_code_once() -> None:
    """A point that the code does not pass would make a test of it pass."""
    text = "\n".join(path.read_text() for path in (ROOT / "trainer").rglob("*.py") if path.name != "faults.py")
    for point in faults.POINTS:
        assert text.count(f'"{point}"') == 1, point


def test_a_heartbeat_is_readable_after_its_writer_was_killed(tmp_path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from trainer.guard.heartbeat import Heartbeat\n"
        f"heart = Heartbeat(Path({str(tmp_path)!r}) / 'heartbeat-3'); heart.beat('save', 7, 56); heart.told('SIGTERM')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert child.returncode == -9
    beat = heartbeat.read_all(tmp_path)[3]
    assert (beat.phase, beat.step, beat.position, beat.signal, beat.beats) == ("save", 7, 56, "SIGTERM", 2)
    assert beat.pid != os.getpid()
    assert abs(beat.alive - beat.since) < 10


def test_a_torn_heartbeat_is_not_believed(tmp_path) -> None:
    heartbeat.Heartbeat(tmp_path / "heartbeat-0")
    data = bytearray((tmp_path / "heartbeat-0").read_bytes())
    data[10] ^= 1
    (tmp_path / "heartbeat-0").write_bytes(data)
    assert heartbeat.read_all(tmp_path) == {}


def noisy(steps: int, seed: int) -> list[tuple[float, float]]:
    """A loss that falls with noise of 3%, and gradient norms that differ by a factor of two or so."""
    noise = random.Random(seed)
    return [
        ((2 + 6 * math.exp(-i / 200)) * math.exp(noise.gauss(0, 0.03)), 0.5 * math.exp(noise.gauss(0, 0.5)))
        for i in range(steps)
    ]


def test_spikes_are_told_from_noise_by_either_figure() -> None:
    for seed in range(5):
        detector = SpikeDetector(GuardConfig())
        for loss, norm in noisy(1000, seed):
            assert detector.reason(loss, norm) == ""
            detector.accept(loss, norm)
    assert "spike: loss" in detector.reason(4.0, 0.5)
    assert "spike: gradient norm" in detector.reason(2.0, 500.0)
    assert detector.reason(0.5, 0.001) == ""  # downwards is no spike
    assert "not finite" in detector.reason(math.nan, 1.0)
    assert SpikeDetector(GuardConfig(spike_threshold=None)).reason(1e9, 1e9) == ""


def test_nothing_is_judged_before_half_a_window_and_the_state_goes_on() -> None:
    options = GuardConfig(spike_window=16)
    first = SpikeDetector(options)
    for loss, norm in noisy(7, 0):
        first.accept(loss, norm)
    assert first.reason(1e6, 1e6) == ""
    first.accept(8.0, 0.5)
    assert first.reason(1e6, 1e6) != ""
    second = SpikeDetector(options)
    second.load(first.state())
    assert second.score("loss", 9.0) == first.score("loss", 9.0) != 0.0


def test_a_spike_does_not_move_what_it_is_measured_by() -> None:
    """Negative control: mean and standard deviation would take the third of three equal spikes for ordinary."""
    detector = SpikeDetector(GuardConfig(spike_window=32))
    for loss, norm in noisy(32, 1):
        detector.accept(loss, norm)
    before = detector.score("loss", 100.0)
    for _ in range(3):
        detector.accept(100.0, 0.5)
    assert detector.score("loss", 100.0) > 0.5 * before
