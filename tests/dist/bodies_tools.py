"""Tools inside warm ranks. Imported by spawned processes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from trainer import config as configuration
from trainer import runfolder, setup
from trainer.ensemble import manifest, parts, sample
from trainer.ensemble.task import evaluate as evaluated_ensemble
from trainer.evaluate.choices import Row, log_likelihoods
from trainer.evaluate.task import evaluate as evaluated
from trainer.metrics.progress import Progress
from trainer.outcome import RunError


def evaluate(
    folder: str, tasks: list[str], overrides: list[str], step: int | None = None, export: str | None = None,
    split: str = "validation",
) -> dict[str, Any]:  # fmt: skip
    """What `orthogon evaluate` finds; an orderly error as its text."""
    try:
        config = runfolder.open_run(Path(folder), overrides)
        source = Path(export) if export is not None else None
        return evaluated(Path(folder), config, step, source, [Path(task) for task in tasks], split)
    except RunError as error:
        return {"error": str(error)}


def evaluate_without_a_compiler(folder: str, tasks: list[str], overrides: list[str]) -> dict[str, Any]:
    """The same where torch.compile must not be called."""
    with mock.patch.object(torch, "compile", side_effect=AssertionError("compiled")):
        return evaluate(folder, tasks, overrides)


def likelihoods_of_a_model_that_sees_its_batch() -> list[float]:
    """Log-likelihoods of 11 rows under a model whose logits depend on all rows of a batch and on its width."""

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        seen = float(input_ids.sum()) + 0.5 * input_ids.shape[1]
        return SimpleNamespace(logits=torch.sin(torch.arange(20.0) * seen).expand(*input_ids.shape, 20))

    rows = [Row(ids=[(3 * i + j) % 20 for j in range(3 + i % 4)], start=1, cut=0) for i in range(11)]
    return log_likelihoods(model, rows, 2, nullcontext, torch.device("cpu"))


def evaluate_ensemble(
    runs: str, name: str, tasks: list[str], overrides: list[str], most: int = 31, split: str = "validation"
) -> dict[str, Any]:
    """What `orthogon ensemble evaluate` finds; an orderly error as its text."""
    try:
        first = manifest.read(Path(runs), name).members[0].run
        config = runfolder.open_run(Path(runs) / first, overrides)
        paths = [Path(task) for task in tasks]
        return evaluated_ensemble(name, Path(runs), config, paths, split=split, most=most, seed=0)
    except RunError as error:
        return {"error": str(error)}


def sample_text(folder: str, runs: str, overrides: list[str], part_tokens: int) -> dict[str, Any]:
    """What `orthogon ensemble sample` finds, with parts of so many tokens, and how many batches this rank decoded; an orderly error as its
    text."""
    try:
        with mock.patch.object(parts, "PART_TOKENS", part_tokens), mock.patch.object(sample, "decode", wraps=sample.decode) as decode:
            answer = sample.sample(Path(folder), Path(runs), overrides)
        return answer | {"decoded": decode.call_count}
    except RunError as error:
        return {"error": str(error)}


def open_until_asked(path: str, overrides: list[str], folder: str) -> dict[str, Any]:
    """Open the data of a configuration; a second later SIGTERM has come. The error as its text and outcome."""
    began = time.monotonic()
    try:
        config = configuration.load(Path(path), overrides)
        setup.open_data(config, Path(folder), Progress(False, 0), lambda: "SIGTERM" if time.monotonic() > began + 1 else "")
        return {}
    except RunError as error:
        return {"error": str(error), "outcome": error.outcome.value}
