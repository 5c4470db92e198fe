"""Slurm by its commands' recorded answers: the job that `sbatch` takes is number 12, and squeue says what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.backends import slurm
from tests.unit.fakes import Fake
from tests.unit.fakes.programs import Fakes


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    programs = Fakes(tmp_path, monkeypatch)
    programs.answer("sbatch", "sbatch", __test_only="test-only-good")
    programs.answer("scancel", "nothing")
    programs.answer("sinfo", "sinfo")
    programs.answer("scontrol", "scontrol-unknown")
    programs.says("squeue", "12|PENDING|Priority|")

    def begin(folder: Path, handle: dict[str, Any]) -> None:
        programs.says("squeue", "12|RUNNING|None|n1")

    def finish(folder: Path, handle: dict[str, Any]) -> None:
        programs.says("squeue", "12|COMPLETED|None|n1")

    def vanish(folder: Path, handle: dict[str, Any]) -> None:
        programs.says("squeue", "")
        monkeypatch.setattr(slurm, "UNSEEN_SECONDS", 0.0)

    def asked(folder: Path, handle: dict[str, Any]) -> str | None:
        calls = [line for line in programs.calls() if line.startswith("scancel")]
        return ("save" if "USR1" in calls[-1] else "now") if calls else None

    return Fake(begin, finish, vanish, asked, waits=True, script="-m trainer train")
