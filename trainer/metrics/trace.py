"""Traces of a few chosen steps: torch's profiler, and the history of CUDA's allocations. Both are off by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.metrics.options import MetricsConfig
from trainer.outcome import RunError

ENTRIES = 200_000
"""Most allocations that a memory snapshot holds; older ones are dropped."""


class Trace:
    """Starts and stops what `metrics.profile` and `metrics.memory_snapshot` ask for, at the borders of steps.

    Every rank writes `RUN/profile/ATTEMPT/rank-N.json.gz` (for Perfetto or chrome://tracing) and
    `RUN/profile/ATTEMPT/rank-N-memory.pickle` (for torch's memory_viz; a pickle, which this program never reads).

    Raises:
        RunError: a memory snapshot where there is no CUDA device.
    """

    def __init__(
        self, config: MetricsConfig, folder: Path, rank: int, device: torch.device, tell: Callable[[str], None]
    ) -> None:
        if config.memory_snapshot is not None and device.type != "cuda":
            raise RunError(
                f"metrics.memory_snapshot records CUDA's allocator, and this run is on the {device.type}",
                where="metrics.memory_snapshot",
                mend="leave it out; metrics.profile works on every device",
            )
        self.folder, self.rank, self.device, self.tell = folder, rank, device, tell
        self._windows: list[tuple[tuple[int, int], Callable[[], None], Callable[[], Path]]] = []
        if config.profile is not None:
            self._windows.append((config.profile, self._start_profiler, self._stop_profiler))
        if config.memory_snapshot is not None:
            self._windows.append((config.memory_snapshot, self._start_memory, self._stop_memory))
        self._running: dict[int, Callable[[], Path]] = {}
        self._profiler: Any = None

    def at(self, step: int) -> None:
        """The border before a step, counted from 1."""
        for index, ((first, number), start, stop) in enumerate(self._windows):
            inside = first <= step < first + number
            if inside and index not in self._running:
                start()
                self._running[index] = stop
            elif not inside and index in self._running:
                self._write(self._running.pop(index), f"steps {first} to {first + number - 1}")

    def close(self) -> None:
        """Write what is still being recorded: the run ended, or failed, inside a window."""
        while self._running:
            index, stop = self._running.popitem()
            self._write(stop, f"steps from {self._windows[index][0][0]} to the end of the run")

    def _write(self, stop: Callable[[], Path], what: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tell(f"traced {what}: {stop()}")
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            self.tell(f"the trace of {what} cannot be written: {error}")

    def _start_profiler(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def _stop_profiler(self) -> Path:
        path = self.folder / f"rank-{self.rank}.json.gz"
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        return path

    def _start_memory(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)

    def _stop_memory(self) -> Path:
        path = self.folder / f"rank-{self.rank}-memory.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        return path
