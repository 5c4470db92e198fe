"""What keeping documents apart costs: forward and backward with and without it, alternating in one process.

    OMP_NUM_THREADS=1 python benchmarks/document_masking.py [--length 1024] [--rounds 7]

The model of configs/quickstart.yaml; rows of documents of 50 to 400 tokens. Prints medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import config as configuration
from trainer.model.loss import summed_loss

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = dict(configuration.load(ROOT / "configs" / "quickstart.yaml").model.config)
    shape = AutoConfig.for_model(options.pop("model_type"), vocab_size=2048, **options)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    inputs = torch.randint(2048, (4, arguments.length))
    starts = torch.randint(50, 400, (4, arguments.length)).cumsum(1)
    places = torch.arange(arguments.length).repeat(4, 1)
    begins = torch.zeros_like(places).scatter_(1, starts.clamp(max=arguments.length - 1), 1)
    positions = places - (places * begins).cummax(1).values
    times: dict[str, list[float]] = {"apart": [], "together": []}
    for round_ in range(arguments.rounds + 1):
        for name, given in (("apart", positions), ("together", None)):
            began = time.perf_counter()
            summed_loss(model, inputs, inputs, given).backward()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["apart"], times["together"], strict=True)]
    print("| documents | median s | min | max |\n|---|---|---|---|")
    for name, values in [*times.items(), ("apart / together", ratios)]:
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
