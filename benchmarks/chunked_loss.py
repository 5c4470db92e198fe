"""What `train.loss_chunk` saves and costs: loss and gradients of a head, all logits at once and in chunks of tokens.

    OMP_NUM_THREADS=1 python benchmarks/chunked_loss.py [--tokens 4096] [--width 512] [--vocabulary 32768] [--chunks 256 1024]

A Llama without blocks in one process: the embedding, the final norm and the head, so that the loss is nearly all there
is. Memory is the rise of the peak resident set over one forward and backward, each in a process of its own in which
freed memory goes back to the system at once. Times are medians (least to most) of rounds in which the contestants take
turns in one process, and ratios to all logits at once. Also timed where it can do it: torch's own
`linear_cross_entropy`, which knows no soft-capped or scaled logits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def contestant(name: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward of the loss: `plain`, `torch`, or tokens per chunk."""
    import torch
    from torch.nn import functional

    from trainer.config import ModelConfig
    from trainer.model import chunked
    from trainer.model.build import architecture, build
    from trainer.model.init import initialize
    from trainer.model.loss import summed_loss

    sizes = {"hidden_size": arguments.width, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 4}
    config = ModelConfig(config={"model_type": "llama", **sizes})
    model: Any = build(architecture(config, vocab_size=arguments.vocabulary, bos=0, eos=1, max_length=arguments.tokens))
    initialize(model, 0, torch.device("cpu"))
    tokens = torch.randint(
        0, arguments.vocabulary, (2, 1, arguments.tokens), generator=torch.Generator().manual_seed(0)
    )
    if name.isdigit():
        chunked.install(model, int(name))

    def torchs() -> Any:
        hidden = model.model(input_ids=tokens[0], use_cache=False).last_hidden_state[0]
        options = torch.nn.LinearCrossEntropyOptions()
        return functional.linear_cross_entropy(
            hidden, model.lm_head.weight, tokens[1, 0], reduction="sum", options=options
        )

    def step() -> None:
        model.zero_grad()
        (torchs() if name == "torch" else summed_loss(model, tokens[0], tokens[1])).backward()

    return step


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    step = contestant(name, arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print(json.dumps(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def memory(name: str, rest: list[str]) -> int:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *rest, f"--measure={name}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rise: int = json.loads(answer.stdout.splitlines()[-1])
    return rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments.measure, arguments)
        return
    names = ["plain", *map(str, arguments.chunks), "torch"]
    rises = {name: memory(name, sys.argv[1:]) for name in names}
    steps = {name: contestant(name, arguments) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in range(arguments.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if count:  # the first warms up
                times[name].append(time.perf_counter() - began)
    print(f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, width {arguments.width}, fp32")
    print("| loss | peak memory, MB | to plain | time, s | least to most | to plain |\n|---|---|---|---|---|---|")
    for name in names:
        label = f"chunks of {name} tokens" if name.isdigit() else {"plain": "all logits", "torch": "torch's own"}[name]
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        print(
            f"| {label} | {rises[name] / 1e6:.0f} | {rises[name] / rises['plain']:.2f} | {statistics.median(times[name]):.2f} "
            f"| {min(times[name]):.2f} to {max(times[name]):.2f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
