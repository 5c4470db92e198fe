"""Ranks that stop, hang, crash or are merely slow: nobody waits for ever, the report names the rank, the next attempt goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.report import report
from tests.chaos import harness

STEPS, HANG_SECONDS = 16, 10
pytestmark = pytest.mark.timeout(600)
GUARD = (f"--guard.hang_timeout={HANG_SECONDS}s", "--guard.stop_timeout=20s")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return harness.place(tmp_path_factory.mktemp("hang"), STEPS)


@pytest.fixture(scope="module")
def calm(place) -> Path:
    code, text = harness.Running(place, "calm").ends(300)
    assert code == 0, text
    return place / "runs/calm"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("stop@step.forward", "stopped or dead"),
        ("sleep=1000@step.data", "while the others waited in a collective"),
        ("segv@step.forward", "SIGSEGV"),
    ],
)
def test_a_rank_that_stops_is_named_and_the_run_goes_on(place, calm, kind, words) -> None:
    name = kind.partition("@")[0].partition("=")[0]
    running = harness.Running(place, name, *GUARD, faults=f"{kind} rank=1 step=8 attempt=1")
    code, text = running.ends(300)
    assert code == 0, text
    assert running.outcomes() == ["infrastructure", "finished"]
    found = report(running.folder, place / "runs", 1)
    assert found["first"]["rank"] == 1, found
    assert words in found["first"]["what"], found
    if name != "segv":
        stacks = (running.folder / "logs/1/rank-0.log").read_text()
        assert "no progress for" in stacks or "another rank hangs for" in stacks
        assert 'File "' in stacks  # where it waited
    assert harness.weights(running.folder) == harness.weights(calm)
    assert harness.history(running.folder) == harness.history(calm)


def test_a_slow_rank_is_no_hang(place, calm) -> None:
    running = harness.Running(place, "slow", *GUARD, faults=f"sleep={HANG_SECONDS - 4}@step.data rank=1 step=8")
    code, text = running.ends(300)
    assert code == 0, text
    assert running.outcomes() == ["finished"]
    assert harness.weights(running.folder) == harness.weights(calm)
