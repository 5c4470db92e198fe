"""Where a run goes, and the options of that backend: from a cluster file and from the command line, which holds overrides of
the run as well. A cluster file is YAML, checked as strictly as a run:

    backend: slurm
    partition: gpu
    gres: gpu:h100:8
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from launch import backends
from launch.process import ROOT
from trainer.outcome import RunError
from trainer.yaml_source import Source, nearest

FOLDER = "configs/clusters"
DEFAULT = "torchrun"


def choose(
    on: str | None, cluster: str | None, given: list[str], before: dict[str, Any] | None = None
) -> tuple[str, Any, list[str]]:
    """The backend's name, its options, checked, and what of `given` is left as overrides of the run's configuration.

    `--nodes 4` and `--nodes=4` are options where the backend has a field `nodes`; a field that is a yes or no may stand
    alone. The command line goes before the cluster file.

    Args:
        on: the backend; None takes the cluster file's, else torchrun.
        cluster: a file, or the name of one in `configs/clusters`.
        before: the handle of a run that is resumed: without a cluster file its options hold, on the same backend.

    Raises:
        RunError: there is no such backend, file or option, a value is not of its kind, or the file is of another backend.
    """
    source = Source(raw={}, file="command line") if cluster is None else Source.read(find(cluster))
    named = source.raw.pop("backend", None)
    if on is not None and named not in (None, on):
        raise RunError(
            f"the cluster file is for {named}, and not for {on}",
            where=source.where("backend"),
            mend=f"leave out --on, or use --on {named}",
        )
    name = str(on or named or DEFAULT)
    if on is None and named is not None and name not in backends.names():
        guess = nearest(name, backends.names())
        mend = f"did you mean {guess}?" if guess else f"one of: {', '.join(backends.names())}"
        raise RunError(f"there is no backend '{name}'", where=source.where("backend"), mend=mend)
    options = backends.find(name).Options
    known = {field.name: field for field in dataclasses.fields(options)}
    if cluster is None and before is not None and before["backend"] == name:
        source.raw |= {key: value for key, value in before.get("options", {}).items() if key in known}
    for key in source.raw:
        if key not in known:
            guess = nearest(str(key), list(known))
            mend = f"did you mean {guess}?" if guess else f"options of {name}: {', '.join(known) or 'none'}"
            if not guess and cluster is not None and on is None and named is None:
                mend = f"name the backend: `backend: slurm` in the file, or --on slurm; {mend}"
            raise RunError(f"{name} has no option '{key}'", where=source.where(str(key)), mend=mend)
    chosen, rest = _split(known, given)
    for word in rest:
        if not re.fullmatch(r"--[A-Za-z_][\w.-]*=.*", word, re.S):
            guess = nearest(word.lstrip("-").replace("-", "_"), list(known))
            mend = f"did you mean --{guess}?" if guess else "write --section.key=value, or an option of the backend: "
            mend += "" if guess else ", ".join(f"--{key}" for key in known)
            raise RunError(f"'{word}' is not understood", where="command line", mend=mend)
    source.override(chosen)
    return name, _checked(options, source), rest


def find(name: str) -> Path:
    """The path of a cluster file.

    Raises:
        RunError: there is none of this name; tells those there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    folders = (Path(FOLDER), ROOT / FOLDER)
    for folder in folders:
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    there = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    guess = nearest(name, there)
    raise RunError(
        f"there is no cluster '{name}'",
        where=FOLDER,
        mend=f"did you mean {guess}?" if guess else f"clusters there: {', '.join(there) or 'none'}; or give a file",
    )


def _split(known: dict[str, Any], given: list[str]) -> tuple[list[str], list[str]]:
    """Options of the backend as `--key=value`, and all else."""
    chosen, rest, words = list[str](), list[str](), list(given)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([A-Za-z_][\w-]*)(=.*)?", word, re.S)
        key = match[1].replace("-", "_") if match else ""
        if match is None or key not in known:
            rest.append(word)
        elif match[2] is not None:
            chosen.append(f"--{key}{match[2]}")
        elif words and not words[0].startswith("--"):
            chosen.append(f"--{key}={words.pop(0)}")
        else:
            chosen.append(f"--{key}=true")
    return chosen, rest


def _checked(options: Any, source: Source) -> Any:
    import pydantic

    try:
        return pydantic.TypeAdapter(options).validate_json(json.dumps(source.raw))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RunError(
            f"{key}: {message[:1].lower() + message[1:]} (it is {first['input']!r})",
            where=source.where(str(first["loc"][0]) if first["loc"] else ""),
            mend=f"correct {key}",
        ) from None
