"""Slurm's commands as scripts on PATH that replay what a real Slurm (22.05) answered: tests/unit/slurm."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.config import RunConfig

RECORDED = Path(__file__).parents[1] / "slurm"


class Fakes:
    """The commands that are there, and the calls they got."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls_file = folder / "bin", folder / "calls"
        self.folder.mkdir()
        for tool in ("bash", "cat", "sleep"):
            (self.folder / tool).symlink_to(
                next(p for p in (Path("/bin") / tool, Path("/usr/bin") / tool) if p.exists())
            )
        monkeypatch.setenv("PATH", str(self.folder))
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)

    def answer(self, command: str, recorded: str, **when: str) -> None:
        """Let a command answer what was recorded, or something else when a certain word is among its arguments.

        Args:
            when: recorded answers by word, with `_` for `-`.
        """
        lines = ["#!/bin/bash", f'echo "{command} $*" >>{shlex.quote(str(self.calls_file))}']
        for word, other in when.items():
            lines.append(f'if [[ " $* " == *"{word.replace("_", "-")}"* ]]; then {replay(other)}; fi')
        lines.append(replay(recorded))
        self.script(command, lines)

    def script(self, command: str, lines: list[str]) -> None:
        path = self.folder / command
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)

    def says(self, command: str, text: str) -> None:
        """Let a command answer a text."""
        self.script(command, ["#!/bin/bash", f'echo "{command} $*" >>{shlex.quote(str(self.calls_file))}', f"printf '%s\\n' {shlex.quote(text)}"])  # fmt: skip

    def calls(self) -> list[str]:
        """The command lines so far."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


def replay(recorded: str) -> str:
    """Shell words that repeat an answer: standard output, standard error, exit code."""
    out, err, code = (RECORDED / f"{recorded}.{kind}" for kind in ("out", "err", "code"))
    assert out.exists() or err.exists() or code.exists() or recorded == "nothing", recorded
    words = [f"cat {shlex.quote(str(out))}"] if out.exists() else []
    words += [f"cat {shlex.quote(str(err))} >&2"] if err.exists() else []
    return "; ".join([*words, f"exit {code.read_text().strip() if code.exists() else 0}"])


def member_configs(config: RunConfig, count: int) -> list[RunConfig]:
    """Members of an ensemble: `NAME-0`, `NAME-1` ... with seeds of their own for weights and order."""
    return [
        replace(
            config,
            name=f"{config.name}-{index}",
            seed=config.seed + index,
            data=replace(config.data, order_seed=config.data.order_seed + index),
        )
        for index in range(count)
    ]
