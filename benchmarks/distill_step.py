"""A step against live teachers: in blocks, and by plain PyTorch with whole logits; and the bytes per token of every cache.

    python benchmarks/distill_step.py --rounds 5

One student and K frozen members of one architecture on one CPU thread, fp32: forward of the members, the student's forward,
loss (alpha 0.9), backward. `plain` adds the members' logits up, takes log_softmax of both sides and torch's own kl_div and
cross_entropy. Peak memory is that of living tensors beyond models, gradients and batch, counted at every operation; time is measured without
counting, rounds alternating. Caches are of the same members with sharpened heads, on the first
row, hidden states in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.config import ModelConfig
from trainer.ensemble import divergence, forms
from trainer.ensemble.states import keeping
from trainer.ensemble.targets import Dense, Heads
from trainer.model.build import architecture, build
from trainer.model.footprint import Living
from trainer.model.init import initialize
from trainer.model.loss import losses

ALPHA = 0.9
TABLE = {"hidden": 12_288, "top-k": 264, "sampled": 36}
"""Bytes per token in the literature at a vocabulary of 128,256: 8 members of width 768; k = 64 in bf16; 50 draws."""


def model(arguments: argparse.Namespace, seed: int) -> Any:
    shape = {
        "model_type": "llama", "hidden_size": arguments.width, "intermediate_size": 4 * arguments.width,
        "num_hidden_layers": arguments.layers, "num_attention_heads": arguments.width // 32,
        "num_key_value_heads": arguments.width // 32,
    }  # fmt: skip
    made: Any = build(
        architecture(
            ModelConfig(config=shape), vocab_size=arguments.vocabulary, bos=0, eos=1, max_length=arguments.length
        )
    )
    initialize(made, seed, torch.device("cpu"))
    return made


def answer(members: list[Any], inputs: torch.Tensor, heads: Heads) -> Dense:
    states = []
    with torch.no_grad():
        for member in members:
            with keeping(member) as kept:
                member(input_ids=inputs, use_cache=False)
            states.append(kept.pop().flatten(0, 1))
    return Dense(torch.cat(states, 1), heads)


def ours(student: Any, members: list[Any], heads: Heads, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    target = answer(members, inputs, heads)
    loss, objective = losses(student, inputs, targets, against=target)
    (objective / targets.numel()).backward()
    return float(loss.detach()) / targets.numel()


def plain(student: Any, members: list[Any], heads: Heads, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    with torch.no_grad():
        total = members[0](input_ids=inputs, use_cache=False).logits
        for member in members[1:]:
            total = total + member(input_ids=inputs, use_cache=False).logits
        teacher = (total / len(members)).log_softmax(-1)
        del total
    logits = student(input_ids=inputs, use_cache=False).logits
    divergent = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = (1 - ALPHA) * entropy + ALPHA * divergent
    (loss / targets.numel()).backward()
    return float(loss.detach()) / targets.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--sharpness", type=float, default=33.0, help="of the cached teacher, whose weights are untrained"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student = model(arguments, 0)
    members = [model(arguments, 1 + k).requires_grad_(False).eval() for k in range(arguments.members)]
    with torch.no_grad():
        matrix = torch.cat([m.get_output_embeddings().weight for m in members], 1)
    heads = Heads(matrix, None, arguments.members, arguments.vocabulary, False)
    inputs, targets = torch.randint(
        0, arguments.vocabulary, (2, arguments.rows, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    divergence.install(student, ALPHA, 1.0, arguments.vocabulary)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    found: dict[str, float] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for count in range(arguments.rounds + 1):
        for name, work in (("plain", plain), ("ours", ours)):
            student.zero_grad()
            began = time.perf_counter()
            found[name] = work(student, members, heads, inputs, targets)
            if count:  # the first warms up
                times[name].append(time.perf_counter() - began)
            gradients[name] = [p.grad.clone() for p in student.parameters()]
    peaks = {}
    for name, work in (("plain", plain), ("ours", ours)):
        student.zero_grad(set_to_none=False)
        with Living() as living:
            work(student, members, heads, inputs, targets)
        peaks[name] = living.peak
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients["ours"], gradients["plain"], strict=True))
    print(
        f"{arguments.members} members and a student of width {arguments.width}, {arguments.layers} layers, vocabulary "
        f"{arguments.vocabulary}; {inputs.numel()} tokens; losses differ by {abs(found['ours'] - found['plain']):.1e}, "
        f"gradients by at most {worst:.1e} of a tensor's norm\n"
    )
    print("| | time, s | least to most | to plain (least to most) | peak, MB | to plain |\n|---|---|---|---|---|---|")
    for name in times:
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        print(
            f"| {name} | {statistics.median(times[name]):.2f} | {min(times[name]):.2f} to {max(times[name]):.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[name] / 1e6:.0f} | "
            f"{peaks[name] / peaks['plain']:.2f} |"
        )
    sharp = Heads(matrix * arguments.sharpness, None, arguments.members, arguments.vocabulary, False)
    target = answer(members, inputs[:1], sharp)
    p = target.some(0, 64, arguments.vocabulary).block(0, arguments.vocabulary).softmax(1)
    print(f"\nEntropy of the teacher: {-torch.xlogy(p, p).sum(1).mean():.2f} nats")
    print("\n| cache | bytes per token here | at 128,256 tokens | in the literature |\n|---|---|---|---|")
    for form in (forms.Hidden(), forms.TopK(64), forms.Sampled(50)):
        size = len(form.encode(target, [0])[0]) / arguments.length
        print(f"| {form.name} | {size:.1f} | {at_large(form, size, arguments)} | {TABLE[form.name]:,} |")


def at_large(form: forms.Form, size: float, arguments: argparse.Namespace) -> str:
    """The same record where ids have 17 bits; of 8 members of width 768."""
    if isinstance(form, forms.Hidden):
        return f"{2 * 8 * 768:,}"
    if isinstance(form, forms.TopK):
        return f"{-(-form.k * 17 // 8) + 2 * form.k + 4}"
    distinct = (size - 1) / forms.item_bytes(forms.bits_of(arguments.vocabulary))
    return f"{1 + 3 * distinct:.1f} ({distinct:.1f} distinct ids)"


if __name__ == "__main__":
    main()
