"""What a process that was forked with all imports (`launch/warm.py`) does in place of starting Python anew."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import IO, Any

from launch import children
from trainer.environment import FORKED

inside = False
"""Whether this process is such a fork."""


def rank(words: list[str], log: IO[Any], environment: Mapping[str, str]) -> children.Forked:
    """The only rank of a run, `python -m trainer WORDS`, as torchrun would start it."""
    return children.Forked(lambda: _program(words), log, {**environment, FORKED: "1"}, _trainer().FLAG.install)


def task(words: list[str], log: IO[Any] | None, environment: Mapping[str, str]) -> children.Forked:
    """A task of one process, `python -m trainer WORDS`."""
    return children.Forked(lambda: _program(words), log, environment, children.default_signals)


def _program(words: list[str]) -> int:
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:  # a new process would read it as it loads torch
        importlib.import_module("torch").set_num_threads(int(threads))
    sys.argv = ["python -m trainer", *words]
    return int(_trainer().main())


def _trainer() -> Any:
    return importlib.import_module("trainer.__main__")  # by name: launchers that are no forks never load torch
