"""The checks of a machine, on machines that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """`program(name, text, code)` puts a program on PATH that says `text`; nothing else is there."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name: str, text: str = "", code: int = 0) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{text}'\nexit {code}\n")
        path.chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("said", "code", "result", "detail"),
    [
        ("NVIDIA H100, 81559, 4, 0", 0, "ok", "1 x NVIDIA H100, 81559 MiB"),
        ("NVIDIA H100, 81559, 4, 3", 0, "failure", "uncorrected memory errors on GPU 0"),
        ("NVIDIA H100, 81559, 70000, [N/A]", 0, "warning", "memory is in use on GPU 0"),
        ("Unable to determine the device handle: GPU is lost", 15, "failure", "GPU is lost"),
        ("", 0, "ok", "none"),
    ],
)
def test_gpus(program, said, code, result, detail) -> None:
    program("nvidia-smi", said, code)
    found = doctor.gpus()
    assert found.result == result
    assert detail in found.detail


def test_slurm_and_time_server(program) -> None:
    assert doctor.slurm().detail == "not here"
    program("sinfo", "all up 4 idle")
    assert doctor.slurm() == doctor.ok("slurm", "all up 4 idle")
    program("sinfo", "no answer", 1)
    assert doctor.slurm().result == "warning"
    assert "cannot be known" in doctor.clocks().detail
    program("timedatectl", "no")
    assert doctor.clocks().result == "warning"
    program("timedatectl", "yes")
    assert doctor.clocks().detail == "steady and synchronized"


def test_a_clock_that_jumps(monkeypatch) -> None:
    true, began = time.time, time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: true() + (5 if true() > began + 0.1 else 0))
    assert doctor.clocks().result == "failure"
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert doctor.clocks().result == "failure"


def test_versions_and_their_pins(tmp_path, monkeypatch) -> None:
    (tmp_path / "constraints.txt").write_text("# pins\ntorch==2.13.0\nnumpy==2.0.0\n")
    assert doctor.pinned(tmp_path / "constraints.txt") == {"torch": "2.13.0", "numpy": "2.0.0"}
    assert doctor.pinned(tmp_path / "none") == {}
    monkeypatch.setattr(doctor.process, "ROOT", tmp_path)
    found = {"torch": "2.13.0+cpu", "transformers": "5.0", "datasets": "4", "safetensors": "1", "numpy": "2.1.0"}
    monkeypatch.setattr("trainer.runfolder.versions", lambda: found)
    assert doctor.versions().result == "warning"
    assert "numpy 2.1.0 (tested: 2.0.0)" in doctor.versions().detail
    found["torch"] = "2.9.1"
    assert doctor.versions().result == "failure"
    del found["torch"]
    assert "not installed: torch" in doctor.versions().detail


def test_disk_and_locks(tmp_path, monkeypatch) -> None:
    runs = tmp_path / "not" / "yet"
    assert doctor.disk(runs).result in ("ok", "warning")
    assert doctor.locks(runs) == doctor.ok("locks", f"hold in {runs}")
    assert list(tmp_path.iterdir()) == []  # nothing is left
    monkeypatch.setattr(doctor.fcntl, "lockf", lambda *_: None)  # a file system that grants every lock
    assert doctor.locks(runs).result == "failure"
    monkeypatch.setattr(doctor.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert doctor.disk(runs).detail.endswith("No space left on device")


def test_a_check_that_breaks_is_a_failure_and_the_worst_counts() -> None:
    broken = doctor.guarded("x", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert (broken.result, "ZeroDivisionError" in broken.detail) == ("failure", True)
    fine, odd = doctor.ok("a", ""), doctor.warning("b", "", "mend")
    assert [doctor.record(f)["result"] for f in ([fine], [fine, odd], [fine, broken, odd])] == [
        "ok",
        "warning",
        "failure",
    ]


def test_ranks_that_do_not_add_up(monkeypatch) -> None:
    fact = {"ranks": 2, "backend": "gloo", "bytes_per_second": 1e9, "right": True}
    monkeypatch.setattr(doctor, "answered", lambda *_: fact)
    assert doctor.all_reduce(2) == doctor.ok("all-reduce", "2 ranks, gloo: 1.00 GB/s per rank, right sum")
    fact["right"] = False
    assert doctor.all_reduce(2).result == "failure"
    monkeypatch.setattr(doctor, "answered", lambda *_: "no route to host")
    assert doctor.all_reduce(None).detail == "no route to host"
    assert next(doctor.with_torch()).result == "failure"


def test_what_torch_sees(monkeypatch, program) -> None:
    gpu = {"name": "H100", "sound": True}
    facts = {"torch": "2.13.0", "gpus": [gpu], "compiler": "no C++ compiler"}
    monkeypatch.setattr(doctor, "answered", lambda *_: facts)
    torch, compiler = doctor.with_torch()
    assert (torch.result, compiler.result) == ("ok", "warning")
    gpu["sound"] = False
    assert next(doctor.with_torch()).result == "failure"
    facts["gpus"] = []
    program("nvidia-smi")
    assert next(doctor.with_torch()).result == "warning"


def test_a_node_is_checked_in_seconds(tmp_path) -> None:
    line = [sys.executable, "-m", "launch.cli", "doctor", "--node", "--json", f"--runs={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    found = json.loads(done.stdout)
    assert done.returncode == (69 if found["result"] == "failure" else 0), done.stderr
    names = [one["check"] for one in found["checks"]]
    assert names == ["python", "versions", "gpus", "clocks", "shared memory", "open files", "slurm", "disk", "locks"]
    assert all(one["mend"] for one in found["checks"] if one["result"] != "ok")


def test_a_failure_ends_with_69(tmp_path) -> None:
    broken = f"from launch import doctor; doctor.python = lambda: doctor.failure('python', 'x', 'y'); doctor.MEGABYTES = 1\nfrom launch.cli import dispatch; import sys; sys.exit(dispatch(['doctor', '--node', '--runs={tmp_path}']))"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, "failure" in done.stdout, "mend:" in done.stdout) == (69, True, True), done.stderr
