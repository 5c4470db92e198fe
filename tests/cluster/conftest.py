"""One cluster for all tests, one configuration, and its undisturbed run that disturbed ones must equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import evidence, handles
from launch.backends import slurm
from launch.choices import choose
from launch.slurm.options import Options
from tests.chaos import harness
from tests.cluster.cluster import Cluster
from tests.cluster.packages import reason_not_to
from trainer import config as configuration
from trainer import runfolder
from trainer.guard import faults, heartbeat

STEPS = 60
SETTINGS = ("--guard.stop_timeout=5 s", "--checkpoint.every=5 steps", "--evaluate.every=30 steps")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    reason = reason_not_to()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as up:
        yield up


@pytest.fixture
def idle(cluster, monkeypatch) -> Cluster:
    """The cluster with every node on and nothing to do, its commands on PATH."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    cluster.ask("scancel", "--user=root")
    cluster.all_idle()
    return cluster


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return harness.place(tmp_path_factory.mktemp("place"), STEPS)


@pytest.fixture(scope="session")
def calm(place) -> Path:
    """The folder of a local run of two ranks that nobody disturbs."""
    line = [sys.executable, "-m", "launch.cli", "run", str(place / "run.yaml"), "--name=calm", *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(harness.ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(line, check=True, cwd=harness.ROOT, env=environment, capture_output=True, timeout=300)
    return place / "runs/calm"


class Submitted:
    """A run that was submitted."""

    def __init__(self, cluster: Cluster, folder: Path, handle: dict[str, Any]) -> None:
        self.cluster, self.folder, self.handle = cluster, folder, handle
        self.seen: list[str] = []

    @property
    def job(self) -> str:
        return str(self.handle["job"])

    def state(self) -> str:
        kind, detail = slurm.state(self.folder, self.handle)
        word = detail.partition(",")[0]
        if self.seen[-1:] != [word]:
            self.seen.append(word)
            print(f"{time.strftime('%H:%M:%S')} job {self.job} of {self.folder.name}: {kind}, {detail}", flush=True)
        return kind

    def until(self, what: Callable[[], object], seconds: float) -> None:
        """Wait for something, watching the job's state."""
        deadline = time.monotonic() + seconds
        while not what():
            self.state()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.3)

    def trains(self, step: int = 6, attempt: int = 1, ranks: int = 2) -> None:
        """Wait until all ranks of an attempt have done so many steps."""

        def there() -> bool:
            beats = heartbeat.read_all(self.folder / f"logs/{attempt}").values()
            return len(beats) == ranks and all(beat.step >= step for beat in beats)

        self.until(there, 240)

    def ends(self, seconds: float = 300) -> str:
        """Wait for the job's end; returns Slurm's word for it."""
        self.until(lambda: self.state() == "ended", seconds)
        return self.seen[-1]

    def accounted(self) -> list[str]:
        """The state of every start of the job, as accounting has them once the last one has ended."""
        words = ("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", f"--jobs={self.job}")
        last = self.seen[-1]
        self.until(lambda: self.cluster.ask(*words, "--format=State").endswith(last), 30)
        states = [line.split()[0] for line in self.cluster.ask(*words, "--format=State").splitlines()]
        print(f"sacct: job {self.job}: {' '.join(states)}", flush=True)
        return states

    def records(self) -> list[dict[str, Any]]:
        found = [evidence.record(self.folder / f"logs/{n}/attempt.json") for n in evidence.attempts(self.folder)]
        return [record or {} for record in found]

    def outcomes(self) -> list[str]:
        return [record.get("outcome", "none") for record in self.records()]

    def facts(self, attempt: int) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"logs/{attempt}/slurm.json").read_text()))

    def said(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in slurm.logs(self.folder, self.handle))

    def equals(self, calm: Path) -> None:
        assert harness.history(self.folder) == harness.history(calm)
        assert harness.weights(self.folder) == harness.weights(calm)


@pytest.fixture
def submit(idle, place, monkeypatch) -> Callable[..., Submitted]:
    """`submit(name, slow=SECONDS, start=...)` makes a run and submits it; `slow` makes each step last longer, in all
    attempts or in those of `attempts`."""

    def make(
        name: str, *overrides: str, slow: float = 0.0, attempts: tuple[int, ...] = (), after: tuple[str, ...] = (), **asked: Any
    ) -> Submitted:  # fmt: skip
        where = [f" attempt={number}" for number in attempts] or [""]
        slowed = [f"sleep={slow}@step.data times=100000{one}" for one in where] if slow else []
        monkeypatch.setenv(faults.VARIABLE, "; ".join(slowed))
        config = configuration.load(place / "run.yaml", [f"--name={name}", *SETTINGS, *overrides])
        folder = runfolder.create(config, ["test"])
        handle = handles.start(config, folder, "slurm", options(**asked), resume=False, after=after)
        return Submitted(idle, folder, handle)

    return make


def options(**asked: Any) -> Options:
    return replace(choose("slurm", "local-test", [])[1], **asked)
