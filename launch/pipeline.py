"""Work through a graph of runs and commands (`launch/graph.py`): what is done is skipped, so that the same command goes on.

A run's digest stands in its `run.json`; that of a command, with its log, in `RUNS/pipelines/GRAPH/`. Runs go through a
backend and survive the driver, which finds them again; commands are its own children, which it ends with itself unless it is killed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import evidence, handles, ledger, process, standing, warm
from launch.backends import torchrun
from launch.graph import Graph, Node, ready, stopped
from trainer import lock, runfolder
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

POLL_SECONDS = 0.5


@dataclass
class Driver:
    """One pass over a graph."""

    graph: Graph
    backend: str
    options: Any
    say: Callable[[str], None] = print
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why, as a sentence."""
    running: dict[str, subprocess.Popen[bytes] | None] = field(default_factory=dict)
    """The process of a command; None for a run."""
    code: int = 0
    """Exit code of the first failure."""

    @property
    def folder(self) -> Path:
        return self.graph.runs / "pipelines" / self.graph.name

    def record_of(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def drive(driver: Driver, limit: int) -> int:
    """Run the graph, `limit` nodes at once, until nothing can go on; returns the exit code.

    Raises:
        RunError: another process drives it, or its folder cannot be written.
    """
    nodes = driver.graph.nodes
    with alone(driver):
        skip_done(driver)
        with warm.kept(worth_warming(driver)):
            work(driver, limit)
    for name, why in stopped(nodes, driver.failed).items():
        driver.say(f"{name}: not started, because {why} failed")
    return driver.code


def worth_warming(driver: Driver) -> bool:
    """Whether several small runs are left to start here."""
    configs = [n.config for n in driver.graph.nodes.values() if n.config is not None and n.name not in driver.done]
    return driver.backend == "torchrun" and sum(map(torchrun.forkable, configs)) > 1


def work(driver: Driver, limit: int) -> None:
    """Start what is ready and see what ends, until nothing can go on."""
    nodes = driver.graph.nodes
    try:
        while names := ready(nodes, driver.done, driver.failed, driver.running, limit) or list(driver.running):
            for name in names:
                if name not in driver.running:
                    begin(driver, nodes[name])
            for name in list(driver.running):
                look(driver, nodes[name])
            if driver.running:
                time.sleep(POLL_SECONDS)
    finally:
        for name, child in driver.running.items():
            if child is not None:
                child.send_signal(signal.SIGTERM)
            else:
                driver.say(f"{name}: goes on; the same command finds it again")


def queue(driver: Driver) -> int:
    """Give all runs that are not done to a backend that lets them wait for each other, and return.

    Raises:
        RunError: a node is a command, or the backend refuses.
    """
    nodes = driver.graph.nodes
    for node in nodes.values():
        if node.config is None:
            raise RunError(
                f"node {node.name} is a command, which no queue takes",
                where=driver.graph.name,
                mend="leave out --queue, and let the pipeline wait itself",
            )
    with alone(driver):
        skip_done(driver)
        for name, node in nodes.items():
            if name not in driver.done:
                begin(driver, node, [one for one in node.after if one not in driver.done])
                if name in driver.failed:
                    break
    return driver.code


def skip_done(driver: Driver) -> None:
    """Find what was done under the digests of now."""
    for name, node in driver.graph.nodes.items():
        if not all(one in driver.done for one in node.after):
            continue
        if node.config is None:
            record = evidence.record(driver.record_of(name)) or {}
            finished = record.get("digest") == node.digest and record.get("exit_code") == 0
        else:
            finished = made_of(node) == node.digest and standing.read(node.config.folder).state == "finished"
        if finished:
            driver.done.append(name)
            driver.say(f"{name}: done before")


def made_of(node: Node) -> str | None:
    """The digest under which a run was made; empty for one that no pipeline made, None where there is none."""
    assert node.config is not None
    if not (node.config.folder / "config.yaml").exists():
        return None
    record = evidence.record(node.config.folder / "run.json") or {}
    return str((record.get("lineage") or {}).get("digest", ""))


def begin(driver: Driver, node: Node, after: list[str] | None = None) -> None:
    """Start a node, or go on with a run that was started before."""
    try:
        driver.running[node.name] = start_command(driver, node) if node.config is None else None
        if node.config is not None:
            give(driver, node, after or [])
    except RunError as error:
        fail(driver, node.name, error.what, error.outcome.code)


def start_command(driver: Driver, node: Node) -> subprocess.Popen[bytes]:
    """A command in a process of its own, with its output in the folder of the pipeline."""
    line = (
        [sys.executable, "-m", "launch.cli", *node.command[1:]] if node.command[0] == "orthogon" else list(node.command)
    )
    try:
        with open(driver.folder / f"{node.name}.log", "w", encoding="utf-8") as log:
            child = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=process.environment(),
            )
    except OSError as error:
        raise RunError(f"{node.command[0]} cannot be started: {error.strerror}") from None
    driver.say(f"{node.name}: started; log: {driver.folder / node.name}.log")
    return child


def give(driver: Driver, node: Node, after: list[str]) -> None:
    """A run to the backend: a new one, or one that this graph began and that is not finished.

    Raises:
        RunError: there is a run of this name that is made of something else, or the backend refuses.
    """
    config, made = node.config, made_of(node)
    assert config is not None
    if made is not None and made != node.digest:
        raise RunError(
            f"there is a run {node.name} already, made from other inputs: remove {config.folder}, or rename the node"
        )
    fresh = made is None
    if fresh:
        runfolder.create(config, runfolder.command_line(), {"pipeline": driver.graph.name, "digest": node.digest})
    elif standing.read(config.folder).alive:
        driver.say(f"{node.name}: goes on already")
        return
    try:
        handles.start(config, config.folder, driver.backend, driver.options, resume=not fresh, after=after)
    except RunError as error:
        if fresh and error.outcome is not Outcome.INFRASTRUCTURE:
            handles.withdraw(config.folder)
        elif not fresh and standing.read(config.folder).alive:  # what a killed driver had started has told so just now
            driver.say(f"{node.name}: goes on already")
            return
        raise
    ledger.remember(config.folder)
    waits = f", after {', '.join(after)}" if after else ""
    driver.say(f"{node.name}: {'started' if fresh else 'resumed'} on {driver.backend}{waits}")


def look(driver: Driver, node: Node) -> None:
    """Note the end of a node that has ended."""
    child = driver.running[node.name]
    if child is not None:
        code = child.poll()
        if code is not None:
            try:
                write_json(driver.record_of(node.name), {"digest": node.digest, "exit_code": code, "time": time.time()})
            except OSError as error:
                why = f"its end cannot be put on record: {error.strerror}"
                fail(driver, node.name, why, Outcome.of_errno(error.errno).code)
                return
            if code == 0:
                finish(driver, node.name)
            else:
                last = evidence.last_lines(driver.folder / f"{node.name}.log", 1)
                told = f": {last[0]}" if last else ""
                fail(
                    driver,
                    node.name,
                    f"the command ended with exit code {code}{told}",
                    code if code > 0 else 128 - code,
                )
        return
    assert node.config is not None
    found = standing.read(node.config.folder)
    if found.state == Outcome.FINISHED.value:
        ledger.remember(node.config.folder, found=found)
        finish(driver, node.name)
    elif not found.alive and found.state != "unknown":
        ledger.remember(node.config.folder, found=found)
        codes = {outcome.value: outcome.code for outcome in Outcome}
        fail(driver, node.name, f"{found.state}: {found.note}", codes.get(found.state, Outcome.INFRASTRUCTURE.code))


def finish(driver: Driver, name: str) -> None:
    """A node is done."""
    driver.running.pop(name)
    driver.done.append(name)
    driver.say(f"{name}: finished ({len(driver.done)} of {len(driver.graph.nodes)})")


def fail(driver: Driver, name: str, why: str, code: int) -> None:
    """A node has failed; others that do not come after it go on."""
    driver.running.pop(name, None)
    driver.failed[name] = why
    driver.code = driver.code or code
    driver.say(f"{name}: failed: {why}")


@contextmanager
def alone(driver: Driver) -> Iterator[None]:
    """No other process drives this graph meanwhile."""
    try:
        driver.folder.mkdir(parents=True, exist_ok=True)
        file = open(driver.folder / "lock", "w", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the pipeline's folder cannot be written: {error.strerror}",
            where=str(driver.folder),
            mend="make room, or make it writable",
            outcome=Outcome.of_errno(error.errno),
        ) from None
    with file:
        if not lock.taken(file):
            raise RunError(
                f"another process drives pipeline {driver.graph.name}", where=str(driver.folder), mend="wait for it"
            )
        yield
