"""One node, ranks that stop: nobody waits for ever, the report names the rank, the next attempt goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.report import report
from tests.chaos.test_nodes import wait_for
from tests.dist.conftest import TINY
from tests.dist.test_supervisor import processes
from trainer.guard import heartbeat

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGSEGV])
def test_a_rank_that_stops_is_named_and_the_run_goes_on(tmp_path, number) -> None:
    lines = [f"Line {i} tells of {i * i} things, of {i % 7} days and of {i % 5} seas." for i in range(200)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(lines))
    calm = TINY.replace(
        'evaluate: {{every: 5 steps, tokens: 6, prompts: ["the sea", "of"]}}', "evaluate: {{every: 1000 steps}}"
    )
    text = calm.format(folder=tmp_path).replace("20 steps", "60 steps")
    (tmp_path / "run.yaml").write_text(
        text + "guard: {hang_timeout: 10 s, stop_timeout: 20 s}\nfinish: {export: false}\n"
    )
    log, folder = tmp_path / "launcher.log", tmp_path / "runs/tiny"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "run", str(tmp_path / "run.yaml")],
            stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        wait_for(
            lambda: any(beat.step > 6 for beat in heartbeat.read_all(folder / "logs/1").values()), 200, log.read_text
        )
        os.kill(next(pid for pid, rank in processes(folder).items() if rank == 1), number)
        wait_for((folder / "logs/1/attempt.json").exists, 100, log.read_text)
        found = report(folder, tmp_path / "runs", 1)
        assert found["outcome"] == "infrastructure", found
        assert found["first"]["rank"] == 1, found
        assert ("SIGSEGV" if number == signal.SIGSEGV else "stopped or dead") in found["first"]["what"], found
        assert process.wait(200) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait(120)
    assert "attempt 2 starts" in log.read_text()
    assert processes(folder) == {}
