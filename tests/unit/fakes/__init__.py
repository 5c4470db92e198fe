"""Stand-ins for the places where runs go: `tests/unit/fakes/BACKEND.py` lets `tests/unit/test_backends.py` try a backend.

Such a file has `fake(tmp_path, monkeypatch) -> Fake`: it puts programs or functions in place of the real ones, and can then
move the run that was submitted last through its life.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Fake:
    """A backend's stand-in. Every function acts on the run in the folder that it gets, which was submitted before."""

    begin: Callable[[Path, dict[str, Any]], None]
    """Let it run, if it waits."""
    finish: Callable[[Path, dict[str, Any]], None]
    """Let it end in order, with an attempt that has finished."""
    vanish: Callable[[Path, dict[str, Any]], None]
    """Let it be gone without a word."""
    asked: Callable[[Path, dict[str, Any]], str | None]
    """What the run was asked for: "save" or "now"; None for nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that the backend needs to submit here."""
    waits: bool = False
    """It can wait for other runs (`after`), as its own tests show."""
    script: str = "resume"
    """A word that `describe` must have in it."""
