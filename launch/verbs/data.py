"""Verbs on token tables: prepare, verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from launch import process


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make the token table that a configuration needs; restartable.

    `--section.key=value` overrides the file.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""

    def __call__(self, overrides: list[str]) -> int:
        from trainer import config as configuration

        configuration.load(self.config, overrides)  # a typo costs a blink, not the import of torch
        return process.task("prepare", str(self.config), *overrides)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check size and SHA-256 of a token table; changes nothing."""

    OVERRIDES: ClassVar[bool] = False
    table: Annotated[Positional[Path], arg(metavar="TABLE")]
    """The folder of the table."""

    def __call__(self, overrides: list[str]) -> int:
        return process.task("verify-table", str(self.table))
