"""Sends a run's history to its sinks, each from a thread of its own: a sink that fails or hangs costs the run nothing.

Every record of `metrics.jsonl` reaches a sink once and in order, over all attempts: what a sink has taken is counted in
`RUN/sinks/NAME.json`, so that a later attempt sends what is missing (all of it to a new sink) and nothing twice.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.config import RunConfig
from trainer.files import digest, read_json
from trainer.outcome import RunError

PATIENCE = 60.0
"""Seconds that the end of a run waits for its sinks, all together."""
HURRY = 10.0
"""The same where the machine is about to be taken away, and where an upload to a server is all that is left."""


@dataclass(frozen=True)
class Target:
    """What a sink is told when it is opened."""

    run: str
    """An id of the run, the same in every attempt."""
    name: str
    folder: Path
    """RUN/sinks."""
    config: dict[str, Any]
    flat_config: dict[str, Any]
    id: str | None
    """The id that the sink gave the run in an earlier attempt."""
    rewind: int | None
    """First step whose records earlier attempts sent and this one sends anew; only for sinks that can take back."""
    patience: float = HURRY
    """Seconds that closing the sink may take to upload."""


def check(config: RunConfig) -> None:
    """Refuse a sink whose package is missing, or that is named twice."""
    names = [options.name for options in config.metrics.sinks]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"the sink {name} is given twice", where="metrics.sinks", mend="remove one")
        packages = import_module(f"trainer.metrics.sinks.{name}").PACKAGES
        if not any(_installed(package) for package in packages):
            raise RunError(
                f"the sink {name} needs the package {packages[0]}, which is not installed",
                where="metrics.sinks",
                mend=f"pip install 'orthogon[{name}]'",
            )


def follow(
    config: RunConfig, folder: Path, step: int, records: list[dict[str, Any]], tell: Callable[[str], None]
) -> list[Follower]:
    """A follower for every sink of the configuration.

    Args:
        step: where this attempt goes on.
        records: the history up to there; what a sink has not taken of it, it gets first.
        tell: says the one sentence of a sink that fails. Called from another thread.
    """
    record = read_json(folder / "run.json")
    run = digest([record["name"], record["created"]])[:16]
    resolved = configuration.resolved(config)
    flat = configuration.flatten(resolved)
    followers = []
    for options in config.metrics.sinks:
        module = import_module(f"trainer.metrics.sinks.{options.name}")
        state = State.read(folder / "sinks" / f"{options.name}.json")
        rewind = None
        if module.REWINDS and state.step > step:
            state.step, state.records, rewind = step, sum(r["step"] == step for r in records), step + 1
        target = Target(run, config.name, folder / "sinks", resolved, flat, state.id, rewind)
        connect = _connect(module, options, target)
        followers.append(Follower(options.name, connect, state, records, tell))
    return followers


def _connect(module: Any, options: Any, target: Target) -> Callable[[], Any]:
    return lambda: module.Sink(options, target)


@dataclass
class State:
    """How much of the history a sink has taken: all records before `step`, and the first `records` of it."""

    path: Path
    id: str | None = None
    step: int = -1
    records: int = 0

    @classmethod
    def read(cls, path: Path) -> State:
        """The state so far; without a readable file nothing was taken."""
        try:
            return cls(path, **read_json(path))
        except (OSError, ValueError, TypeError):
            return cls(path)

    def write(self) -> None:
        """Replace the file. Survives the end of the process, not a power cut: then some records are sent twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self.id, "step": self.step, "records": self.records}))
        os.replace(temporary, self.path)


class Follower:
    """One sink and its thread."""

    def __init__(
        self, name: str, connect: Callable[[], Any], state: State, records: list[dict[str, Any]],
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.name, self.connect, self.state, self.tell = name, connect, state, tell
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._at, self._seen = -1, 0
        self._failed = False
        for record in records:
            self.put(record)
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Take the next record; never waits."""
        if not self._failed:
            self._queue.put(record)

    def close(self, deadline: float) -> None:
        """Wait until all is sent, at most until `deadline` (monotonic seconds)."""
        self._queue.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.tell(
                f"sink {self.name} is left behind: it did not end in time; the next attempt sends what is missing"
            )

    def _run(self) -> None:
        try:
            sink = self.connect()
            self.state.id = sink.id
            self.state.write()
            open_ = True
            while open_:
                batch = [self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get())
                open_ = None not in batch
                self._send(sink, [record for record in batch if record is not None])
            sink.close()
        except Exception as error:
            self._failed = True
            self.tell(
                f"sink {self.name} failed and gets no more in this attempt; metrics.jsonl is complete, and the next "
                f"attempt sends what is missing: {type(error).__name__}: {redacted(str(error))}"
            )

    def _send(self, sink: Any, records: list[dict[str, Any]]) -> None:
        try:
            for record in records:
                step = record["step"]
                self._at, self._seen = (step, self._seen + 1) if step == self._at else (step, 1)
                if (self._at, self._seen) > (self.state.step, self.state.records):
                    if values := numbers(record):
                        sink.write(step, values)
                    self.state.step, self.state.records = self._at, self._seen
        finally:  # what was taken before a failure counts
            sink.flush()
            self.state.write()


def numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record; those of a section as `section/key`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step" and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found


def redacted(text: str) -> str:
    """`text` on one line, without credentials in URLs and without the values of secret environment variables."""
    for key, value in os.environ.items():
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD", key.upper()) and len(value) >= 6:
            text = text.replace(value, "***")
    return " ".join(re.sub(r"://[^/\s@]+@", "://***@", text).split())


def _installed(package: str) -> bool:
    """By its metadata: a folder of that name in the working directory could be imported, too."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
