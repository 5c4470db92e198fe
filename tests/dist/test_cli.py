"""The commands as a person types them: real torchrun, real signals, real exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.test_run import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"Line {i} tells of {i * i} things, of {i % 7} days and of {i % 5} seas." for i in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(lines))
    text = CONFIG.format(folder=folder).replace("device: cpu", "device: cpu, ranks: 2")
    (folder / "run.yaml").write_text(text)
    return folder


def orthogon(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip


def finished(*arguments: str) -> tuple[int, str]:
    process = orthogon(*arguments)
    out, error = process.communicate(timeout=200)
    return process.returncode, out + error


def test_run_signal_resume_export_generate_verify(place) -> None:
    runs = f"--runs={place}/runs"
    folder = place / "runs/r"
    process = orthogon("run", str(place / "run.yaml"), "--train.length=100000 steps")
    deadline = time.monotonic() + 120
    history = folder / "metrics.jsonl"
    while not (history.exists() and history.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, out + error
    assert f"orthogon resume r --runs={place}/runs" in out
    outcome = json.loads((folder / "logs/1/outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    assert (folder / f"checkpoints/step-{outcome['step']:08d}/manifest.json").exists()

    code, text = finished("resume", "r", runs, f"--train.length={outcome['step'] + 5} steps", "--finish.prompts=[Line]")
    assert code == 0, text
    assert f"resumed from step-{outcome['step']:08d}" in text
    assert "logits equal to the trainer" in text
    assert (folder / "figures/loss.png").stat().st_size > 5000
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, outcome["step"] + 6))

    code, text = finished("generate", "r", runs, "--prompt=Line 7", "--tokens=5", "--temperature=0")
    assert code == 0
    assert text.startswith("Line 7")
    assert finished("generate", "r", runs, "--prompt=Line 7", "--tokens=5", "--temperature=0")[1] == text

    assert finished("checkpoint", "verify", "r", runs)[0] == 0
    shard = next((folder / f"checkpoints/step-{outcome['step'] + 5:08d}").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    code, text = finished("checkpoint", "verify", "r", runs)
    assert code == 69
    assert shard.name in text


def test_bad_input_exits_78_with_one_sentence_and_loses_nothing(place) -> None:
    config = str(place / "run.yaml")
    (place / "runs/taken").mkdir(parents=True)
    (place / "runs/taken/config.yaml").touch()
    (place / "runs/notes").mkdir()
    for arguments, words in (
        (("run", config, "--name=taken"), "there is a run taken already"),
        (("run", config, "--name=notes"), "there is a folder notes already, and it is no run"),
        (("run", config, "--runs=/proc/nowhere"), "the run folder cannot be made"),
        (("run", config, "--optm.lr=1"), "did you mean optim?"),
        (("resume", "nothing", f"--runs={place}/runs"), "there is no run nothing"),
        (("resume", "../runs/r", f"--runs={place}/runs"), "is no run name"),
        (("generat", "r"), "did you mean generate?"),
        (("checkpoint", "verify", "r", "--rnus=x"), "is not understood"),
        (("run", str(place / "no.yaml")), "there is no file"),
    ):
        code, text = finished(*arguments)
        assert (code, words in text) == (78, True), text
        assert "Traceback" not in text
    assert [path.name for path in (place / "runs/taken").iterdir()] == ["config.yaml"]
    assert list((place / "runs/notes").iterdir()) == []


def test_bad_data_ends_as_bad_configuration_through_torchrun(place) -> None:
    code, text = finished("run", str(place / "run.yaml"), "--name=empty", f"--data.path={place}/none.txt")
    assert code == 78, text
    assert "there is no text at" in text
    assert json.loads((place / "runs/empty/logs/1/outcome.json").read_text())["outcome"] == "bad configuration"
    code, text = finished("run", str(place / "run.yaml"), "--name=shape", "--model.config.hidden_sizes=3")
    assert code == 78, text
    assert "did you mean hidden_size?" in text
