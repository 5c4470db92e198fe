"""A `kubectl` on PATH that keeps a file as its cluster: what was created is there until it is deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fakes import Fake

KUBECTL = """#!/bin/sh
echo "$*" >>{calls}
case $1 in
  create) echo '{{"active": 1, "ready": 0}}' >{status} ;;
  get) [ -e {status} ] || {{ echo 'Error from server (NotFound): jobs.batch "x" not found' >&2; exit 1; }}
    echo "{{\\"status\\": $(cat {status})}}" ;;
  delete) rm -f {status} ;;
esac
"""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    program, status, calls = tmp_path / "bin/kubectl", tmp_path / "status", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(status=status, calls=calls))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    def begin(folder: Path, handle: dict[str, Any]) -> None:
        status.write_text('{"active": 1, "ready": 1}')

    def finish(folder: Path, handle: dict[str, Any]) -> None:
        status.write_text(json.dumps({"conditions": [{"type": "Complete", "status": "True"}]}))

    def vanish(folder: Path, handle: dict[str, Any]) -> None:
        status.unlink(missing_ok=True)

    def asked(folder: Path, handle: dict[str, Any]) -> str | None:
        last = calls.read_text().splitlines()[-1]
        return None if not last.startswith("delete") else "now" if "--grace-period=0" in last else "save"

    return Fake(begin, finish, vanish, asked, options={"image": "orthogon:cpu", "claim": "runs"}, script="kind: Job")
