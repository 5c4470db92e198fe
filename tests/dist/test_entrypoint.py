"""The container's entrypoint, run directly: a signal to it reaches the trainer, which saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.dist.test_run import CONFIG

ROOT = Path(__file__).parents[2]


def test_sigterm_to_the_entrypoint_saves_and_exits_75(tmp_path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Line {i} of {i * i} things and {i % 7} days." for i in range(200)))
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path).replace("fsdp2", "single"))
    folder = tmp_path / "runs/r"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [ROOT / "docker/entrypoint", "run", tmp_path / "run.yaml", "--train.length=100000 steps"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "ORTHOGON_COMMIT": "told by the image"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, out + error
    outcome = json.loads((folder / "logs/1/outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    assert (folder / f"checkpoints/step-{outcome['step']:08d}/manifest.json").exists()
    assert json.loads((folder / "run.json").read_text())["git_commit"] == "told by the image"
