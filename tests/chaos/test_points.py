"""Killed, signalled or refused by the disk at every fault point, one after the other in one run, which then ends as if
nothing had been: the same weights and moments to the bit, the same history."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import harness
from trainer.checkpoint import manifest as manifests
from trainer.guard.faults import POINTS

STEPS = 64
SAVE_EVERY = 2
AT_START = [p for p in POINTS if p.startswith(("start.", "load."))]
IN_STEP = [p for p in POINTS if p.startswith("step.")]
IN_SAVE = [p for p in POINTS if p.startswith("save.") and p not in ("save.background",)]
RANK_ZERO = (
    "start.data", "history.write", "end.outcome", "save.before_manifest", "save.after_manifest", "save.rename", "save.renamed", "save.prune",
)  # fmt: skip
"""Points that only rank 0 passes."""
SAVED = ("save.renamed", "save.prune")
"""Points at which the generation is a checkpoint already."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return harness.place(tmp_path_factory.mktemp("points"), STEPS)


@pytest.fixture(scope="module")
def calm(place) -> Path:
    code, text = harness.Running(place, "calm").ends(300)
    assert code == 0, text
    return place / "runs/calm"


def kills(points: list[str], more: list[str], last: list[tuple[str, int]]) -> tuple[str, int]:
    """A fault for each attempt, so that most attempts make a newer checkpoint than the one before; and their number.

    `points` of a step or a save come one after the other, the points of a start (`more`) between them, `last` at steps given.
    """
    faults, newest = [], 0

    def strike(point: str, step: int | None = None) -> None:
        attempt = len(faults) + 1
        rank = 0 if point in RANK_ZERO else attempt // 2 % 2
        faults.append(f"kill@{point} rank={rank} attempt={attempt}" + (f" step={step}" if step else ""))

    for index, point in enumerate(points):
        if index < len(more):
            strike(more[index])
        save = point in IN_SAVE
        strike(point, newest + (2 if save else 1) * SAVE_EVERY + (not save))
        newest += SAVE_EVERY * (1 + (point in SAVED))
    for point, step in last:
        strike(point, step)
    return "; ".join(faults), len(faults)


KILLED = {
    "saves": kills(IN_SAVE, [], [("end.begin", STEPS)]),
    "starts and steps": kills(
        IN_STEP, AT_START, [("validate.batch", 21), ("history.write", 23), ("end.outcome", STEPS)]
    ),
}  # fmt: skip


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("where", KILLED)
def test_killed_at_every_point(place, calm, where) -> None:
    faults, count = KILLED[where]
    running = harness.Running(place, f"killed-{where[:4]}", "--restarts=100", faults=faults)
    code, text = running.ends(900)
    assert code == 0, text
    assert running.outcomes() == [*["infrastructure"] * count, "finished"]
    assert harness.weights(running.folder) == harness.weights(calm)
    assert harness.history(running.folder) == harness.history(calm)
    steps = [record["step"] for record in harness.history(running.folder) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_every_point_has_its_fault() -> None:
    struck = " ".join(faults for faults, _ in KILLED.values())
    assert [p for p in POINTS if f"@{p} " not in struck] == [
        "save.background",
        "cache.part",
    ]  # the latter: tests/dist/test_distillation.py


SIGNALLED = [
    ("step.data", 3), ("start.begin", 0), ("step.forward", 5), ("start.data", 0), ("step.agreed", 7), ("start.model", 0),
    ("step.updated", 10), ("start.restored", 0), ("step.border", 13), ("validate.batch", 21), ("save.begin", 24),
    ("save.write", 26), ("save.before_manifest", 28), ("save.renamed", 30), ("end.begin", STEPS), ("end.outcome", STEPS),
]  # fmt: skip
"""Points and steps; those of a start make no newer checkpoint, and stand between others, so that the pauses stay short."""


@pytest.mark.timeout(1200)
def test_told_to_stop_at_every_point(place, calm) -> None:
    """SIGTERM, SIGUSR1, SIGINT in turn, to one rank only; each ends in a checkpoint that verifies and the outcome preempted."""
    words = []
    for index, (point, step) in enumerate(SIGNALLED):
        kind, rank = (
            ("term", "usr1", "int")[index % 3],
            0 if point in (*RANK_ZERO, "end.outcome") else index % 2,
        )
        words.append(f"{kind}@{point} rank={rank} attempt={index + 1}" + (f" step={step}" if step else ""))
    running = harness.Running(place, "told", "--restarts=100", faults="; ".join(words))
    code, text = running.ends(1100)
    assert code == 0, text
    # The last one comes when everything is saved and done: the run is finished, and says so.
    assert running.outcomes() == [*["preempted"] * (len(SIGNALLED) - 1), "finished"]
    assert harness.weights(running.folder) == harness.weights(calm)
    assert harness.history(running.folder) == harness.history(calm)
    assert not list((running.folder / "logs").glob("*/hang*"))


@pytest.mark.timeout(400)
def test_a_disk_that_refuses_costs_a_checkpoint_and_no_step(place, calm) -> None:
    """Full, over quota, broken, read-only at each point of a save, on either rank: the run goes on and misses nothing."""
    kinds, faults = ("ENOSPC", "EDQUOT", "EIO", "EROFS"), []
    for index, point in enumerate(p for p in IN_SAVE if p != "save.prune"):
        rank = 0 if point in RANK_ZERO else index % 2
        faults.append(f"{kinds[index % 4]}@{point} rank={rank} step={4 * (index + 1)}")
    running = harness.Running(place, "refused", faults="; ".join([*faults, "ENOSPC@history.write step=9 times=3"]))
    code, text = running.ends(300)
    assert code == 0, text
    assert running.outcomes() == ["finished"]
    assert text.count("NOT SAVED") == len(faults)
    assert harness.weights(running.folder) == harness.weights(calm)
    assert harness.history(running.folder) == harness.history(calm)
    assert not list((running.folder / "checkpoints").glob("*.tmp-*"))


@pytest.mark.timeout(400)
def test_the_last_save_that_fails_is_no_finished_run(place) -> None:
    """Exit status and outcome tell the truth: trained, but not saved, is not finished; a resume needs no new step."""
    running = harness.Running(place, "unsaved", "--train.length=5 steps", faults="ENOSPC@save.write rank=1 step=5")
    code, text = running.ends(200)
    assert code == 73, text
    assert running.outcomes() == ["no space"]
    assert manifests.step_of(manifests.generations(running.folder / "checkpoints")[0]) == 4
    code, text = harness.Running(place, "unsaved", verb="resume").ends(200)
    assert code == 0, text
