"""A supervisor that only waits: a small process in place of `orthogon resume`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import handles
from launch.backends import torchrun
from tests.unit.fakes import Fake
from trainer.files import write_json

WAITS = """
import signal, sys, time
from pathlib import Path
asked = Path(sys.argv[1]) / "asked"
signal.signal(signal.SIGTERM, lambda number, frame: asked.write_text("save"))
(Path(sys.argv[1]) / "ready").touch()
time.sleep(120)
"""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(torchrun, "_line", lambda folder, options: [sys.executable, "-S", "-c", WAITS, str(folder)])

    def begin(folder: Path, handle: dict[str, Any]) -> None:
        while not (folder / "ready").exists():
            time.sleep(0.01)

    def vanish(folder: Path, handle: dict[str, Any]) -> None:
        begin(folder, handle)
        os.kill(handle["pid"], signal.SIGKILL)
        while torchrun.state(folder, handle)[0] == "running":
            time.sleep(0.01)

    def finish(folder: Path, handle: dict[str, Any]) -> None:
        ended = {key: handle[key] for key in ("pid", "started", "host")} | {
            "exit_code": 0,
            "message": "",
            "time": time.time(),
        }
        write_json(folder / "logs" / handles.LAST_WORD, ended)
        vanish(folder, handle)

    def asked(folder: Path, handle: dict[str, Any]) -> str | None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if (folder / "asked").exists() and (
                text := (folder / "asked").read_text()
            ):  # it is there before it is written
                return text
            if torchrun.state(folder, handle)[0] != "running":
                return "now"
            time.sleep(0.01)
        return None

    return Fake(begin, finish, vanish, asked, script="-m trainer train")
