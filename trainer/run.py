"""A run in progress on one rank: what the loop, its saves and its setbacks work on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import distributed, runfolder
from trainer.checkpoint.background import Background
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches
from trainer.derive import Derived
from trainer.ensemble.lessons import Lessons
from trainer.evaluate.samples import Samples
from trainer.files import read_json
from trainer.guard.heartbeat import Heartbeat
from trainer.guard.spikes import SpikeDetector
from trainer.guard.watchdog import Watchdog
from trainer.lock import Lock
from trainer.metrics.groups import GroupMetrics
from trainer.metrics.history import History
from trainer.metrics.progress import Progress
from trainer.metrics.trace import Trace


@dataclass
class Run:
    """A run in progress on one rank. `step` and `position` are where it is; the rest stays as it is set up."""

    config: RunConfig
    folder: Path
    attempt: int
    watch: Watchdog
    detector: SpikeDetector
    device: torch.device
    data: Data
    derived: Derived
    model: Any
    strategy: Any
    optimizer: Any
    parameters: list[Any]
    names: dict[Any, str]
    batches: Batches
    validation: dict[str, Batches]
    samples: Samples
    history: History
    groups: GroupMetrics
    trace: Trace
    progress: Progress
    architecture: dict[str, Any]
    flops_per_token: int | None
    peak_flops: float | None
    lessons: Lessons | None
    """The teacher, in a run that has one."""
    started: float = field(default_factory=time.monotonic)
    lock: Lock | None = None
    """On rank 0: the run folder is ours."""
    background: Background | None = None
    """The save that goes on behind the run's back, if there can be one."""
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    """The step of the newest checkpoint, or of the one that is being written."""
    saving: tuple[int, int, float] = (-1, 0, 0.0)
    """Of the save that began last: step, position, and when."""
    step: int = 0
    position: int = 0
    skips: int = 0
    """Steps in a row that were skipped."""
    applied: int = 0
    """Steps in a row that were applied since a skip or a return."""
    rollbacks: int = 0
    """Returns to the last good checkpoint since the run was sound."""
    skipped: list[list[int]] = field(default_factory=list)
    """Windows of data that no update came from: position and number of sequences."""
    validated_step: int = -1
    silent: bool = False
    """Whether events are left out: the steps are done again only to be compared."""
    data_seconds: float = 0.0
    save_seconds: float = 0.0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def heart(self) -> Heartbeat:
        return self.watch.heart

    @property
    def out_of_time(self) -> bool:
        limit = self.config.train.time_limit
        return limit is not None and time.monotonic() - self.started > limit

    def tensors(self) -> dict[str, Any]:
        """All tensors of a checkpoint, as the strategy gives and takes them."""
        found: dict[str, Any] = self.strategy.tensors(self.model, self.optimizer, self.names)
        return found

    def lineage(self) -> dict[str, Any]:
        """Where the run came from, as `run.json` records it."""
        lineage: dict[str, Any] = read_json(self.folder / "run.json").get("lineage", {})
        return lineage

    def state(self) -> dict[str, Any]:
        """All of a checkpoint that is no tensor."""
        return {
            "optimizer": self.optimizer.hyperparameters(),
            "good": self.skips == 0,
            "skips": self.skips,
            "applied": self.applied,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "detector": self.detector.state(),
            "validated_step": self.validated_step,
            "architecture": self.architecture,
            "data": self.data.identity(),
            **({"teacher": self.lessons.identity()} if self.lessons else {}),
        }

    def event(self, kind: str, **facts: Any) -> None:
        """Append to `events.jsonl`, on rank 0."""
        if distributed.rank() == 0 and not self.silent:
            runfolder.record_event(self.folder, kind, **facts)

    def close(self, *, hurry: bool = False) -> None:
        """Give back what the run holds, the folder last; followers of the history get less time in a hurry."""
        self.trace.close()
        self.history.close(hurry=hurry)
        self.strategy.close()
        if self.lock is not None:
            self.watch.every_moment = lambda: None
            self.lock.release()

    def report_rejected(self, count: int) -> None:
        """Say how many matrices the last step left as they were; known with the next agreement, or at a save."""
        if count:
            self.progress.say(f"step {self.step}: {count} matrices had no sound update and were left as they were")
            self.event("rejected", step=self.step, matrices=count)
