"""A graph of runs and commands with what each waits for, read from a YAML file; what can start next is a pure function.

    runs: runs                       # the folder of the run folders
    nodes:
      member-0: {config: member.yaml, set: {seed: 0}}
      member-1: {config: member.yaml, set: {seed: 1}}
      compare: {command: [orthogon, diff, member-0, member-1], after: [member-0, member-1], inputs: [notes.txt]}

A node has a digest of all that its result follows from: its configuration or command, the content of its input files, and
the digests of what it comes after. Done is what was done under this digest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import digest, sha256_file
from trainer.outcome import RunError
from trainer.yaml_source import Source, nearest

if TYPE_CHECKING:
    from trainer.config import RunConfig

KEYS = {"config": str, "set": dict, "command": list, "after": list, "inputs": list}
SPEED_ONLY = ("name", "runs", "resources", "metrics", "checkpoint")
"""Sections of the configuration that do not change what a run computes."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A run, whose name it bears, or a command."""

    name: str
    config: RunConfig | None = None
    command: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    """Files whose content counts."""
    digest: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which each comes after those that it waits for."""

    name: str
    runs: Path
    nodes: Mapping[str, Node] = field(default_factory=dict)


def ready(
    nodes: Mapping[str, Node], done: Collection[str], failed: Collection[str], running: Collection[str], limit: int
) -> list[str]:
    """The nodes to start now, at most so many that `limit` run at once; in the order of the graph."""
    begun = {*done, *failed, *running}
    free = [name for name, node in nodes.items() if name not in begun and all(one in done for one in node.after)]
    return free[: max(0, limit - len(running))]


def stopped(nodes: Mapping[str, Node], failed: Collection[str]) -> dict[str, str]:
    """The nodes that can never start, with the failed node that is the reason."""
    found: dict[str, str] = {}
    for name, node in nodes.items():  # in order: what a node waits for has been looked at
        for one in node.after:
            if name not in failed and (one in failed or one in found):
                found.setdefault(name, found.get(one, one))
    return found


def read(path: Path) -> Graph:
    """The graph in a YAML file; paths in it are relative to the file's folder, `runs` to the present one.

    Raises:
        RunError: the file, a configuration or an input is not there or not right, or nodes wait for each other.
    """
    source = Source.read(path)
    for key in source.raw.keys() - {"runs", "nodes"}:
        raise RunError(f"unknown key {key}", where=source.where(key), mend="a graph has the keys runs and nodes")
    raw = source.raw.get("nodes")
    if not isinstance(raw, dict) or not raw:
        raise RunError("the graph has no nodes", where=source.where("nodes"), mend="add nodes: {NAME: {config: FILE}}")
    for name, keys in raw.items():
        _check_keys(name, keys, raw, source)
    runs = Path(str(source.raw.get("runs", "runs")))
    nodes: dict[str, Node] = {}
    for name in _ordered({name: keys.get("after", []) for name, keys in raw.items()}, source):
        nodes[name] = _node(name, raw[name], path.parent, runs, nodes, source)
    return Graph(path.stem, runs, nodes)


def of_runs(name: str, configs: Sequence[RunConfig]) -> Graph:
    """A graph of runs that wait for nothing, under the digests that `read` would give them."""
    nodes = {
        config.name: Node(name=config.name, config=config, digest=digest({"after": {}, "config": settings(config)}))
        for config in configs
    }
    return Graph(name, Path(configs[0].runs), nodes)


def settings(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that what a run computes follows from."""
    from trainer import config as configuration

    return {key: value for key, value in configuration.resolved(config).items() if key not in SPEED_ONLY}


def _check_keys(name: str, keys: Any, raw: Mapping[str, Any], source: Source) -> None:
    where = source.where(f"nodes.{name}")
    if Path(name).name != name or not name[0].isalnum():
        raise RunError(f"'{name}' is no name of a node", where=where, mend="use letters, digits, '.', '_', '-'")
    if not isinstance(keys, dict) or ("config" in keys) == ("command" in keys):
        raise RunError(f"node {name} needs a config or a command", where=where, mend="give one of the two")
    for key, value in keys.items():
        if key not in KEYS or not isinstance(value, KEYS[key]):
            guess = nearest(key, list(KEYS))
            mend = f"did you mean {guess}?" if guess and guess != key else f"keys: {', '.join(KEYS)}"
            what = f"{key} is no {KEYS[key].__name__}" if key in KEYS else f"unknown key {key}"
            raise RunError(f"node {name}: {what}", where=source.where(f"nodes.{name}.{key}"), mend=mend)
    if keys.get("command") == []:
        raise RunError(f"node {name}: command is empty", where=where, mend="give the program and its arguments")
    for one in keys.get("after", []):
        if one not in raw:
            guess = nearest(str(one), list(raw))
            mend = f"did you mean {guess}?" if guess else f"nodes: {', '.join(raw)}"
            raise RunError(f"node {name} comes after {one}, which is no node", where=where, mend=mend)


def _ordered(after: Mapping[str, list[str]], source: Source) -> list[str]:
    """The names, each after those that it waits for."""
    found: list[str] = []
    while len(found) < len(after):
        free = [name for name in after if name not in found and all(one in found for one in after[name])]
        if not free:
            rest = ", ".join(name for name in after if name not in found)
            raise RunError(f"nodes wait for each other: {rest}", where=source.where("nodes"), mend="cut the circle")
        found += free
    return found


def _node(name: str, keys: Any, home: Path, runs: Path, before: Mapping[str, Node], source: Source) -> Node:
    from trainer import config as configuration

    after, inputs = tuple(keys.get("after", [])), tuple(home / str(one) for one in keys.get("inputs", []))
    facts: dict[str, Any] = {"after": {one: before[one].digest for one in after}}
    config, command = None, tuple(str(word) for word in keys.get("command", []))
    if "config" in keys:
        chosen = [
            f"--{key}={json.dumps(value)}" for key, value in configuration.flatten(keys.get("set", {})).items() if key
        ]
        config = configuration.load(home / keys["config"], [*chosen, f"--name={name}", f"--runs={runs}"])
        facts["config"] = settings(config)
    else:
        facts["command"] = list(command)
    for path in inputs:
        try:
            facts.setdefault("inputs", {})[os.path.relpath(path, home)] = sha256_file(path)
        except OSError as error:
            raise RunError(
                f"node {name}: input {path} cannot be read: {error.strerror}",
                where=source.where(f"nodes.{name}.inputs"),
                mend="correct the path; what an earlier node makes is no input, but follows from its digest",
            ) from None
    return Node(name=name, config=config, command=command, after=after, inputs=inputs, digest=digest(facts))
