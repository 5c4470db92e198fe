"""Verbs on the checkpoints of a run: list, verify, export, average."""

from __future__ import annotations

import json as json_format
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from launch import process
from launch.verbs.options import Json, RunName, Runs, Step, weights
from trainer.checkpoint import manifest as manifests
from trainer.outcome import Outcome, RunError


@dataclass(frozen=True, kw_only=True)
class List:
    """List the finished checkpoints of a run, oldest first."""

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        records = [_facts(path) for path in reversed(manifests.generations(folder / "checkpoints"))]
        if self.json:
            print(json_format.dumps(records))
            return 0
        for record in records:
            if "damage" in record:
                print(f"{record['name']}  damaged: {record['damage']}")
                continue
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["saved_at"]))
            print(
                f"{record['name']}  {record['sequences']:>12,} sequences  saved {saved}  "
                f"{record['ranks']:>3} ranks  {record['bytes'] / 1e6:>10,.1f} MB"
            )
        if not records:
            print(f"run {self.run} has no checkpoint")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check size and SHA-256 of every file of every checkpoint; changes nothing."""

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        paths = list(reversed(manifests.generations(folder / "checkpoints")))
        if not paths:
            raise RunError(f"run {self.run} has no checkpoint", where=str(folder), mend=f"orthogon resume {self.run}")
        records: list[dict[str, Any]] = []
        for path in paths:
            try:
                found = manifests.verify(path)
                records.append({"name": path.name, "files": len(found.files), "tensors": len(found.tensors)})
                line = f"{path.name}  good: {len(found.files)} files, {len(found.tensors)} tensors"
            except manifests.Damaged as damage:
                records.append({"name": path.name, "damage": str(damage)})
                line = f"{path.name}  damaged: {damage}"
            if not self.json:
                print(line, flush=True)
        if self.json:
            print(json_format.dumps(records))
        return Outcome.INFRASTRUCTURE.code if any("damage" in record for record in records) else 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint in the Hugging Face format, proven by comparing logits."""

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    step: Step = None
    to: Path | None = None
    """The new folder; none takes RUN/export/step-N."""
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        options = [*weights(folder, self.step, None), *_target(self.to)]
        return process.task("export", str(folder), *options)


@dataclass(frozen=True, kw_only=True)
class Average:
    """Write the average of several checkpoints' weights in the Hugging Face format.

    Every checkpoint is verified first. `orthogon evaluate RUN --export FOLDER` tells what the average is worth.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    steps: tuple[int, ...] = ()
    """The steps of the checkpoints, e.g. --steps 100 200 300; none takes all."""
    rule: Literal["uniform", "ema"] = "uniform"
    """uniform: equal weights. ema: from the oldest on, average = decay * average + (1 - decay) * checkpoint."""
    decay: float | None = None
    """The decay of ema, between 0 and 1; 0.5 if it is not given."""
    to: Path | None = None
    """The new folder; none takes RUN/export/average-RULE-STEPS."""
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        if self.decay is not None and self.rule != "ema":
            raise RunError("--decay belongs to --rule ema", where="command line", mend="add --rule ema")
        decay = 0.5 if self.decay is None else self.decay
        if not 0 < decay < 1:
            raise RunError(f"--decay is {decay:g}", where="command line", mend="it must be between 0 and 1")
        options = [f"--decay={decay}"] if self.rule == "ema" else []
        options += _target(self.to)
        for step in self.steps:
            manifests.find(folder, step)
        options += ["--steps", *map(str, self.steps)] if self.steps else []
        return process.task("average", str(folder), *options)


def _target(folder: Path | None) -> list[str]:
    """The option of a task that names its new folder.

    Raises:
        RunError: the folder exists; torch is not loaded to say so.
    """
    if folder is not None and folder.exists():
        raise RunError(f"{folder} exists", where="command line, --to", mend="choose another folder")
    return [] if folder is None else [f"--to={folder}"]


def _facts(path: Path) -> dict[str, Any]:
    """What a manifest says of its checkpoint, files unread."""
    try:
        found = manifests.read(path)
    except manifests.Damaged as damage:
        return {"name": path.name, "damage": str(damage)}
    return {
        "name": path.name,
        "step": found.step,
        "sequences": found.position,
        "saved_at": found.saved_at,
        "ranks": found.world_size,
        "bytes": sum(file["size"] for file in found.files.values()),
    }
