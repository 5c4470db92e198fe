"""What a warm process saves: a grid of four small runs, two at a time, forked and started anew, in turns.

    OMP_NUM_THREADS=1 python benchmarks/warm_start.py --rounds 3

Every round makes new runs in a folder of its own; the first one, which prepares the text, is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = """\
name: t
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}}
data: {path: text.txt, tokenizer: {vocab_size: 300}, sequence_length: 64, subset_tokens: 4096, documents: line, validation_fraction: 0.1}
train: {length: 1 epochs, tokens_per_step: 512, micro_batch_size: 8}
optim: {name: adamw, lr: 0.003}
parallel: {name: single}
resources: {ranks: 1, device: cpu}
finish: {export: false}
"""
GRID = [
    "tune",
    "run.yaml",
    "--method=grid",
    "--epochs",
    "1",
    "2",
    "--lr",
    "0.001",
    "0.003",
    "--weight-decay",
    "0.1",
    "--at-once=2",
]
COLD = "import contextlib, launch.warm; launch.warm.kept = lambda worth: contextlib.nullcontext()"
WAYS = {"started anew": COLD, "forked": "pass"}


def seconds(folder: Path, first: str, runs: str) -> float:
    """Of one grid, everything included."""
    code = f"{first}; from launch.cli import main; main()"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(folder / "state"),
        "OMP_NUM_THREADS": "1",
    }
    started = time.monotonic()
    words = [sys.executable, "-c", code, *GRID, f"--runs={runs}"]
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lines = [
            f"the {a} of the {b} is {c}" for a in ("cat", "dog", "end") for b in ("sea", "hill") for c in range(200)
        ]
        (folder / "text.txt").write_text("\n".join(lines))
        (folder / "run.yaml").write_text(RUN)
        for number in range(rounds + 1):
            for way, first in WAYS.items():
                spent = seconds(folder, first, f"runs-{number}-{way[0]}")
                if number:
                    found[way].append(spent)
    base = statistics.median(found["started anew"])
    print("| four runs of 8 and 16 steps | s | least to most | to started anew |\n|---|---|---|---|")
    for way, some in found.items():
        middle = statistics.median(some)
        print(f"| {way} | {middle:.1f} | {min(some):.1f} to {max(some):.1f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
