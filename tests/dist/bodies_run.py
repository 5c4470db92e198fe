"""Whole runs inside warm ranks. Imported by spawned processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.bodies import fingerprint
from trainer import config as configuration
from trainer import loop, runfolder, setup
from trainer.guard.faults import arm
from trainer.guard.heartbeat import Heartbeat
from trainer.guard.signals import Flag
from trainer.guard.watchdog import Watchdog
from trainer.metrics.history import lasting
from trainer.outcome import RunError


class StopAt(Flag):
    """A signal that arrives on the last rank while step `at` is computed."""

    def __init__(self, at: int | None) -> None:
        self.at, self.run = at, None
        super().__init__()

    @property
    def signal(self) -> str | None:  # type: ignore[override]
        here = self.run is not None and self.run.step + 1 == self.at and self.run.heart.phase == "agreement"
        return "SIGTERM" if here and dist.get_rank() == dist.get_world_size() - 1 else None

    @signal.setter
    def signal(self, value: str | None) -> None:
        pass


def train(
    path: str, overrides: list[str], stop_at: int | None = None, faults: str = "", verify: bool = False
) -> dict[str, Any]:
    """Create or resume the run of a YAML file, train it with faults on purpose, and say how it ended."""
    config = configuration.load(Path(path), overrides)
    if dist.get_rank() == 0:
        if not config.folder.exists():
            runfolder.create(config, ["test"])
        attempt = runfolder.new_attempt(config.folder)
    dist.barrier()
    attempt = max(int(p.name) for p in (config.folder / "logs").iterdir())
    flag = StopAt(stop_at)
    arm(faults)
    try:
        run = setup.set_up(config.folder, config, attempt, watchdog(config.folder, attempt, flag), verify)
    except RunError as error:
        return {"error": str(error)}
    flag.run = run
    started = run.step
    loaded = fingerprint(run.tensors()) if started else {}
    outcome, message = loop.train(run)
    run.close()
    history = (config.folder / "metrics.jsonl").read_text().splitlines()
    records = [lasting(json.loads(line)) for line in history]
    return {
        "outcome": outcome.value,
        "message": message,
        "started": started,
        "step": run.step,
        "position": run.position,
        "loaded": loaded,
        "tensors": fingerprint(run.tensors()),
        "history": records,
        "skipped": run.skipped,
        "events": [{k: v for k, v in event.items() if k != "time"} for event in runfolder.events(config.folder)],
        "loss": [r["loss"] for r in records if "loss" in r],
    }


def watchdog(folder: Path, attempt: int, flag: Flag) -> Watchdog:
    """One that is not started: tests have timeouts of their own."""
    return Watchdog(Heartbeat(None), flag, folder / "logs" / str(attempt), dist.get_rank())
