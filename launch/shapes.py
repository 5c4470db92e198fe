"""The footprint of a model (`trainer/model/footprint.py`), computed once by a process with torch and kept in the user's
cache folder: a plan of another number of GPUs then takes a fraction of a second."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.backends import torchrun
from trainer import config as configuration
from trainer.files import digest, read_json, write_json

if TYPE_CHECKING:
    from trainer.config import RunConfig

FORMAT = 2
"""Of the record; a change makes all cached ones unknown."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/orthogon`, or `~/.cache/orthogon`."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "orthogon" / "shapes"


def shapes(config: RunConfig) -> dict[str, Any]:
    """The footprint of the run's model, from the cache or from a process of its own.

    A refusal of that process (an architecture that cannot be built, a tokenizer that is not there) ends this one with
    its sentence.
    """
    path = cache_folder() / f"{key(config)}.json"
    try:
        record: dict[str, Any] = read_json(path)
        return record
    except (OSError, ValueError):
        pass
    with tempfile.TemporaryDirectory(prefix="orthogon-plan-") as folder:
        source = Path(folder) / "config.json"
        write_json(source, configuration.resolved(config))
        alone = replace(config, resources=replace(config.resources, device="cpu", ranks=1))
        record = torchrun.answer(alone, "shapes", str(source), alone=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError:
        pass  # a home that is full or read-only: the next plan asks again
    return record


def key(config: RunConfig) -> str:
    """What a footprint depends on, as a digest: sections of the configuration, files they name, versions."""
    raw = configuration.resolved(config)
    tokenizer = config.data.tokenizer.path
    tables = [one.table for one in (config.data.mixture.values() or [config.data]) if one.table is not None]
    named = [tokenizer, *(f"{table}/tokenizer" for table in tables), config.model.init_from]
    return digest(
        {
            "format": FORMAT,
            "model": raw["model"],
            "optim": raw["optim"],
            "tokenizer": raw["data"]["tokenizer"],
            "data": [raw["data"]["sequence_length"], raw["data"]["document_masking"]],
            "train": [raw["train"][k] for k in ("loss_chunk", "activation_checkpointing", "precision")],
            "cast": config.parallel.name == "fsdp2",
            "files": [_state(Path(path)) for path in named if path is not None],
            "versions": [metadata.version(name) for name in ("torch", "transformers")],
        }
    )[:24]


def _state(path: Path) -> list[Any]:
    """What tells a folder from what it was before."""
    found = [p for p in (path, path / "config.json", path / "tokenizer.json") if p.exists()]
    return [str(path.absolute()), *(p.stat().st_mtime_ns for p in found)]
