"""The options of a backend, from a cluster file and from the command line, which holds overrides of the run as well."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from launch import backends
from trainer.outcome import RunError
from trainer.yaml_source import Source, nearest


def choose(name: str, cluster: Path | None, given: list[str]) -> tuple[Any, list[str]]:
    """The options of a backend, checked, and what of `given` is left as overrides of the run's configuration.

    `--nodes 4` and `--nodes=4` are options where the backend has a field `nodes`; a field that is a yes or no may stand
    alone. The command line goes before the cluster file.

    Raises:
        RunError: there is no such backend, file or option, or a value is not of its kind.
    """
    options = backends.find(name).Options
    source = Source(raw={}, file="command line") if cluster is None else Source.read(cluster)
    known = {field.name: field for field in dataclasses.fields(options)}
    for key in source.raw:
        if key not in known:
            guess = nearest(str(key), list(known))
            mend = f"did you mean {guess}?" if guess else f"options of {name}: {', '.join(known) or 'none'}"
            raise RunError(f"{name} has no option '{key}'", where=source.where(str(key)), mend=mend)
    chosen, rest = _split(known, given)
    for word in rest:
        if not re.fullmatch(r"--[A-Za-z_][\w.-]*=.*", word, re.S):
            guess = nearest(word.lstrip("-").replace("-", "_"), list(known))
            mend = f"did you mean --{guess}?" if guess else "write --section.key=value, or an option of the backend: "
            mend += "" if guess else ", ".join(f"--{key}" for key in known)
            raise RunError(f"'{word}' is not understood", where="command line", mend=mend)
    source.override(chosen)
    return _checked(options, source), rest


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
        key = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise RunError(
            f"{key}: {message[:1].lower() + message[1:]} (it is {first['input']!r})",
            where=source.where(key),
            mend=f"correct {key}",
        ) from None
