"""Runs whose batches are written down. Imported by spawned processes."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.dist import bodies_run
from trainer.data.batches import MASKED, Batches, MicroBatch
from trainer.data.stream import Stream


def train_recording(path: str, overrides: list[str], stop_at: int | None = None) -> dict[str, Any]:
    """As `bodies_run.train`; `seen` has, for every training step of this rank, (position, inputs of its real rows)."""
    seen: list[tuple[int, list[list[int]]]] = []
    true_at = Batches.at

    def at(self: Batches, position: int, count: int) -> list[MicroBatch]:
        batches = true_at(self, position, count)
        if isinstance(self.sequences, Stream):
            rows = [
                inputs.tolist()
                for batch in batches
                for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
                if (targets != MASKED).any()
            ]
            seen.append((position, rows))
        return batches

    with mock.patch.object(Batches, "at", at):
        return bodies_run.train(path, overrides, stop_at) | {"seen": seen}
