"""Cluster files: what to ask a cluster for, in YAML, checked as strictly as a run.

backend: slurm
partition: gpu
gres: gpu:h100:8
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
from pydantic import TypeAdapter

from launch.process import ROOT
from trainer import registry
from trainer.outcome import RunError
from trainer.yaml_source import Source, nearest

FOLDER = "configs/clusters"


def load(name: str, overrides: list[str] | None = None) -> tuple[str, Any]:
    """The backend's name and its options, from a file or from the name of one in `configs/clusters`.

    Args:
        overrides: `--key=value`, over the file.

    Raises:
        RunError: there is no such file, or a key or value in it is wrong.
    """
    source = Source.read(find(name))
    source.override(overrides or [])
    backend = source.raw.pop("backend", "slurm")
    known = registry.alternatives("launch.backends")
    if backend not in known:
        guess = nearest(str(backend), list(known))
        raise RunError(
            f"there is no backend '{backend}'",
            where=source.where("backend"),
            mend=f"did you mean {guess}?" if guess else f"one of: {', '.join(known)}",
        )
    return str(backend), validated(known[str(backend)].Options, source)


def find(name: str) -> Path:
    """The path of a cluster file.

    Raises:
        RunError: there is none; names those there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    for folder in (Path(FOLDER), ROOT / FOLDER):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    there = sorted({path.stem for folder in (Path(FOLDER), ROOT / FOLDER) for path in folder.glob("*.yaml")})
    guess = nearest(name, there)
    raise RunError(
        f"there is no cluster '{name}'",
        where=FOLDER,
        mend=f"did you mean {guess}?" if guess else f"clusters there: {', '.join(there) or 'none'}; or give a file",
    )


def validated(options: Any, source: Source) -> Any:
    """The options that a source describes.

    Raises:
        RunError: the first mistake, with file, line, key and the nearest name.
    """
    try:
        return TypeAdapter(options).validate_json(json.dumps(source.raw))
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
    key = ".".join(str(part) for part in first["loc"])
    where = source.where(str(first["loc"][0])) if first["loc"] else source.file
    if first["type"] == "unexpected_keyword_argument":
        known = [field.name for field in fields(options)]
        guess = nearest(key, known)
        mend = f"did you mean {guess}?" if guess else f"known keys: {', '.join(sorted(known))}"
        raise RunError(f"unknown key {key}", where=where, mend=mend)
    message = first["msg"].removeprefix("Value error, ")
    raise RunError(
        f"{key}: {message[0].lower() + message[1:]} (it is {first['input']!r})", where=where, mend=f"correct {key}"
    )
