"""Losses of an ensemble and its members: in blocks of logits, against the loop that holds the logits of all members.

    OMP_NUM_THREADS=1 python benchmarks/ensemble_eval.py [--members 8] [--tokens 1024] [--batches 2] [--vocabulary 32768]

Small Llamas in one process. The loop has all models in memory, makes the logits of all of them for a batch, and takes the
cross-entropy of each and of their mean. Ours is what `orthogon ensemble evaluate` does: members one after another through
one model, hidden states and heads on disk, then the losses of the same subsets. Both read the weights from files, which is
part of the time. Memory is the rise of the peak resident set over one evaluation, in a process of its own in which freed
memory goes back to the system at once. Times are medians (least to most) of rounds in which the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NAMES = ("loop", "ours")


def model_of(arguments: argparse.Namespace) -> Any:
    """A Llama; values are still to be given."""
    from trainer.config import ModelConfig
    from trainer.model.build import architecture, build

    sizes = {"hidden_size": arguments.width, "intermediate_size": 3 * arguments.width, "num_hidden_layers": 2}
    config = ModelConfig(config={"model_type": "llama", "num_attention_heads": 4, **sizes})
    return build(architecture(config, vocab_size=arguments.vocabulary, bos=0, eos=1, max_length=arguments.tokens))


def made(arguments: argparse.Namespace, seed: int | None = None) -> Any:
    """A model with initial weights, or without a seed with room for weights only."""
    import torch

    from trainer.model.init import initialize

    model = model_of(arguments)
    initialize(model, seed or 0, torch.device("cpu"), weights=seed is not None)
    return model.eval()


def batches(arguments: argparse.Namespace) -> list[Any]:
    import torch

    from trainer.data.batches import MicroBatch

    draw = torch.Generator().manual_seed(0)
    shape = (arguments.batches, 2, 1, arguments.tokens)
    return [
        MicroBatch(inputs, targets, None)
        for inputs, targets in torch.randint(0, arguments.vocabulary, shape, generator=draw)
    ]


def loop(arguments: argparse.Namespace, place: Path) -> list[float]:
    """Mean loss of each member and of the logit mean, with the logits of all members in memory."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional

    models = [made(arguments) for _ in range(arguments.members)]
    for k, model in enumerate(models):
        model.load_state_dict(load_file(place / f"{k}.safetensors"))
    sums = torch.zeros(arguments.members + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(arguments):
            logits = torch.stack([model(input_ids=batch.inputs, use_cache=False).logits[0] for model in models])
            for k, one in enumerate((*logits, logits.mean(0))):
                sums[k] += functional.cross_entropy(one, batch.targets[0], reduction="sum").double()
    return (sums / (arguments.batches * arguments.tokens)).tolist()


def ours(arguments: argparse.Namespace, place: Path) -> list[float]:
    """The same by what the product does."""
    import torch
    from safetensors.torch import load_file

    from trainer.ensemble.prediction import chunks, subset_losses
    from trainer.ensemble.states import hidden_states
    from trainer.parallel import single

    device = torch.device("cpu")
    model = made(arguments)
    strategy = single.Strategy(single.Options(), "fp32", device, 1)
    strategy.connect(model, None)
    members = []
    for k in range(arguments.members):
        model.load_state_dict(load_file(place / f"{k}.safetensors"))
        members.append(hidden_states(model, strategy, batches(arguments), place, device))
    subsets = [(k,) for k in range(arguments.members)] + [tuple(range(arguments.members))]
    tokens, columns = chunks(arguments.members, arguments.width)
    sums = torch.zeros(len(subsets), dtype=torch.float64)
    for index, batch in enumerate(batches(arguments)):
        for member in members:
            member.offset = index * arguments.tokens
        losses = subset_losses(members, batch.targets[0], subsets, arguments.vocabulary, tokens=tokens, columns=columns)
        sums += losses[0].sum(1)
    return (sums / (arguments.batches * arguments.tokens)).tolist()


def write_members(arguments: argparse.Namespace, place: Path) -> None:
    from safetensors.torch import save_file

    for k in range(arguments.members):
        save_file(made(arguments, k).state_dict(), place / f"{k}.safetensors")


def apart(name: str, place: Path) -> int:
    """Do something in a process of its own; returns by how much its memory rose.

    To be called while this process is small: a peak begins with what the parent holds.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], f"--apart={name}", f"--place={place}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rise: int = json.loads(answer.stdout.splitlines()[-1])
    return rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    works: dict[str, Any] = {"loop": loop, "ours": ours, "write": write_members}
    if arguments.apart:
        made(argparse.Namespace(width=8, vocabulary=16, tokens=8), 0)  # what imports take is no part of it
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        works[arguments.apart](arguments, arguments.place)
        print(json.dumps(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        apart("write", place)
        rises = {name: apart(name, place) for name in NAMES}
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        found: dict[str, list[float]] = {}
        for count in range(arguments.rounds + 1):
            for name in NAMES:
                began = time.perf_counter()
                found[name] = works[name](arguments, place)
                if count:  # the first warms up
                    times[name].append(time.perf_counter() - began)
    largest = max(abs(a - b) for a, b in zip(found["loop"], found["ours"], strict=True))
    print(
        f"{arguments.members} members, width {arguments.width}, vocabulary {arguments.vocabulary}, {arguments.batches} batches of "
        f"{arguments.tokens} tokens, fp32; largest difference of losses {largest:.1e}"
    )
    print(
        "| | peak memory, MB | to the loop | time, s | least to most | to the loop (least to most) |\n|---|---|---|---|---|---|"
    )
    for name in NAMES:
        ratios = [a / b for a, b in zip(times[name], times["loop"], strict=True)]
        print(
            f"| {name} | {rises[name] / 1e6:.0f} | {rises[name] / rises['loop']:.3f} | {statistics.median(times[name]):.2f} "
            f"| {min(times[name]):.2f} to {max(times[name]):.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
