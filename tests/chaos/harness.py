"""Real runs that really die: `orthogon run` in a process of its own, with faults in its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import drill, evidence
from trainer.checkpoint import contents
from trainer.checkpoint import manifest as manifests
from trainer.files import read_json
from trainer.guard import heartbeat
from trainer.guard.faults import VARIABLE
from trainer.metrics.history import lasting

ROOT = Path(__file__).parents[2]
SETTINGS = ("--evaluate.every=7 steps", "--checkpoint.keep=2")


def place(folder: Path, steps: int) -> Path:
    """The corpus and the configuration of the drill in a new folder, which is returned; a save after every second step."""
    drill.prepare(folder / "drill", steps)
    return folder / "drill"


started: list[subprocess.Popen[str]] = []


class Running:
    """`orthogon VERB ...` on the place's runs, in the background."""

    def __init__(self, place: Path, name: str, *words: str, verb: str = "run", faults: str = "") -> None:
        self.place, self.name, self.folder = place, name, place / "runs" / name
        target = (
            [str(place / "run.yaml"), f"--name={name}", *SETTINGS] if verb == "run" else [name, f"--runs={place}/runs"]
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", VARIABLE: faults}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", verb, *target, *words], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(self.process)

    def ends(self, seconds: float) -> tuple[int, str]:
        """The exit code and what was said; nothing of the run may be left alive after it."""
        text, _ = self.process.communicate(timeout=seconds)
        until(lambda: not processes_of(self.folder), 20, lambda: processes_of(self.folder))
        return self.process.returncode, text

    def second(self) -> tuple[int, str]:
        """The end of a job beside another one of the same run."""
        text, _ = self.process.communicate(timeout=100)
        return self.process.returncode, text

    def beats(self, attempt: int) -> dict[int, heartbeat.Beat]:
        return heartbeat.read_all(self.folder / f"logs/{attempt}")

    def trains(self, attempt: int = 1, step: int = 1, ranks: int = 2) -> None:
        """Wait until all ranks of an attempt have done so many steps."""

        def there() -> bool:
            beats = self.beats(attempt)
            return len(beats) == ranks and all(beat.step >= step for beat in beats.values())

        until(there, 240, lambda: (self.process.poll(), self.beats(attempt)))

    def outcomes(self) -> list[str]:
        return outcomes(self.folder)


def until(what: Callable[[], object], seconds: float, hint: Callable[[], object] = str) -> None:
    """Wait for something that can be seen."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, hint()
        time.sleep(0.05)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the living processes that serve a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{folder} " in f"{line} " and state != "Z":
            found.append(line)
    return found


def outcomes(folder: Path) -> list[str]:
    """The outcome of each attempt, in order."""
    return [read_json(folder / f"logs/{n}/attempt.json")["outcome"] for n in evidence.attempts(folder)]


def weights(folder: Path) -> dict[str, str]:
    """Digests of all weights and moments of the newest checkpoint, which must verify."""
    newest = manifests.generations(folder / "checkpoints")[0]
    manifests.verify(newest)
    return contents.digests(newest)


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without timings."""
    return [lasting(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
