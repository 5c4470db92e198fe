"""How long a run takes from SIGTERM to its saved checkpoint and to its end, beside the bound that it prints at its start.

    python benchmarks/stop_time.py [--rounds 5] [--hidden 128 512]

Starts `orthogon run` at 2 ranks, sends the launcher SIGTERM in the middle of training, resumes, and so on. Prints medians with
minimum and maximum of seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=[192, 768], help="hidden sizes of the model")
    arguments = parser.parse_args()
    print(
        "| hidden size | checkpoint | bound | signal to saved | signal to end of all processes |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for hidden in arguments.hidden:
            print(measure(Path(folder), hidden, arguments.rounds), flush=True)


def measure(runs: Path, hidden: int, rounds: int) -> str:
    """One row of the table."""
    name = f"hidden-{hidden}"
    overrides = [
        f"--name={name}", f"--runs={runs}", f"--data.folder={runs}/prepared", "--train.length=100000 steps",
        f"--model.config.hidden_size={hidden}", f"--model.config.intermediate_size={4 * hidden}",
        "--checkpoint.every=100000 steps", "--evaluate.every=100000 steps",
    ]  # fmt: skip
    saved, ended = [], []
    for number in range(rounds):
        words = (
            ["resume", name, f"--runs={runs}"] if number else ["run", str(ROOT / "configs/quickstart.yaml"), *overrides]
        )
        with subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *words], cwd=ROOT, stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        ) as run:  # fmt: skip
            before = steps(runs / name)
            while steps(runs / name) < before + 3:
                assert run.poll() is None, "the run has ended by itself"
                time.sleep(0.1)
            told = time.time()
            run.send_signal(signal.SIGTERM)
            assert run.wait() == 75
        ended.append(time.time() - told)
        saved.append(last(runs / name / "events.jsonl", "saved")["time"] - told)
    (checkpoint,) = sorted((runs / name / "checkpoints").glob("step-*"))[-1:]
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e6
    bound = yaml.safe_load((runs / name / "config.yaml").read_text())["guard"]["stop_timeout"]
    return f"| {hidden} | {size:,.0f} MB | {bound} | {spread(saved)} | {spread(ended)} |"


def steps(folder: Path) -> int:
    """Steps in the history."""
    path = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def last(path: Path, event: str) -> dict:
    """The last event of a kind."""
    return [one for one in map(json.loads, path.read_text().splitlines()) if one["event"] == event][-1]


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    main()
