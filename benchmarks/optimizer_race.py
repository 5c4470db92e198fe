"""Tokens to a loss, on real text: every optimizer with a rate tuned by the same budget, several seeds where asked.

A Llama of half a million parameters on the source text of Python's library, less than one pass, one process and thread.

1. Rates, seed 0: a grid of four by factors of two, and further ones while the best is at an end. That of AdamW first: its
   best is also the rate of embeddings, head and norms under all other rules.
2. Seeds 1 and 2 at the best rate, for the rules in `SEEDED`.
3. Whole runs of half of the steps, with a decay of their own: how many tokens a rule needs to end
   where AdamW ends is read off between them (linear in the logarithm of the tokens).

Every run is a line of the file RESULTS; the same command goes on, `--table` writes what is there into docs/optimizers.md.

    python benchmarks/optimizer_race.py RESULTS [--table]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import optimizer_tables as page
from benchmarks.optimizer_tables import markdown
from trainer import config as configuration
from trainer import data
from trainer.data.batches import Batches
from trainer.model.build import architecture, build
from trainer.model.init import initialize
from trainer.model.loss import summed_loss
from trainer.optim import build_optimizer, dct
from trainer.schedule import factor

STEPS, TOKENS, LENGTH = 240, 2048, 128
ROWS = TOKENS // LENGTH
MODEL = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": False,
}  # fmt: skip
GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (0.002, 0.004, 0.008, 0.016),
    "muon": (0.004, 0.008, 0.016, 0.032),
    "normuon": (0.004, 0.008, 0.016, 0.032),
    "root": (0.004, 0.008, 0.016, 0.032),
    "auon": (0.0125, 0.025, 0.05, 0.1),
    "hybrid_auon": (0.00375, 0.0075, 0.015, 0.03),
    "dct_adamw": (0.004, 0.008, 0.016, 0.032),
    "dct_adamw, random basis": (0.004, 0.008, 0.016, 0.032),
    "trion": (0.004, 0.008, 0.016, 0.032),
    "trion, random basis": (0.004, 0.008, 0.016, 0.032),
}
SEEDED = ("adamw", "muon", "normuon", "root")
SEEDS = 3
MOST_RATES = 6
SHARES = (0.5,)


def settings(rule: str, lr: float, aux: float, steps: int, seed: int) -> Any:
    name, _, basis = rule.partition(", ")
    optim: dict[str, Any] = {"name": name, "lr": lr} | ({} if name == "adamw" else {"adamw": {"lr": aux}})
    optim |= {"transform": "matmul"} if basis else {}
    return configuration.parse(
        {
            "name": "race", "seed": seed, "model": {"config": MODEL},
            "data": {
                "path": "stdlib", "tokenizer": {"vocab_size": 1024}, "sequence_length": LENGTH, "order_seed": seed,
                "validation_fraction": 0.01,
            },
            "train": {"length": f"{steps} steps", "tokens_per_step": TOKENS},
            "optim": optim, "schedule": {"name": "wsd", "warmup": 0.05, "decay": 0.6}, "parallel": {"name": "ddp"},
        }
    )  # fmt: skip


@functools.cache
def random_basis(size: int, dtype: Any, device: Any) -> Tensor:
    """A random orthogonal basis in place of the cosines."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].to(dtype)


def run(rule: str, lr: float, aux: float, steps: int, seed: int) -> dict[str, Any]:
    """Train once; the last validation loss in nats per token, null where it is not finite."""
    config = settings(rule, lr, aux, steps, seed)
    opened = data.open_data(data.prepare(config.data, lambda _: None), config.data)
    facts = opened.tokenizer
    shape = architecture(
        config.model, vocab_size=facts["vocab_size"], bos=facts["bos"], eos=facts["eos"], max_length=LENGTH
    )
    with torch.device("meta"):
        model = build(shape)
    initialize(model, seed, torch.device("cpu"))
    cosines, dct.basis = dct.basis, random_basis if "random" in rule else dct.basis
    began = time.monotonic()
    try:
        optimizer = build_optimizer(model, config.optim)
        batches = Batches(opened.train, 0, 1, ROWS, 1)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(config.schedule, step, steps)
            batch = batches.at(step * ROWS, ROWS)[0]
            (summed_loss(model, batch.inputs, batch.targets) / TOKENS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        dct.basis = cosines
    (held,) = opened.validation.values()
    checks, total, count = Batches(held, 0, 1, ROWS, 1), 0.0, min(held.sequences, 640)
    with torch.no_grad():
        for start in range(0, count, ROWS):
            batch = checks.at(start, min(ROWS, count - start))[0]
            total += float(summed_loss(model, batch.inputs, batch.targets))
    loss = total / count / LENGTH
    return {
        "rule": rule, "lr": lr, "aux": aux, "steps": steps, "seed": seed, "loss": loss if math.isfinite(loss) else None,
        "seconds": round(time.monotonic() - began, 1), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


class Results:
    """What was run, kept in a file."""

    def __init__(self, path: Path, may_run: bool) -> None:
        self.path, self.may_run = path, may_run
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def loss(self, rule: str, lr: float, aux: float, steps: int = STEPS, seed: int = 0) -> float | None:
        """The loss of a run, trained now if it was not before; infinite if it diverged, None where nothing may run."""
        wanted = {"rule": rule, "lr": lr, "aux": aux, "steps": steps, "seed": seed}
        found = next((line for line in self.lines if wanted.items() <= line.items()), None)
        if found is None:
            if not self.may_run:
                return None
            found = run(rule, lr, aux, steps, seed)
            self.lines.append(found)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(found, flush=True)
        return math.inf if found["loss"] is None else float(found["loss"])

    def tuned(self, rule: str, aux: float | None) -> dict[float, float]:
        """The losses by rate, of the grid and of what lies beyond an end that is best."""
        losses: dict[float, float] = {}
        waiting = list(GRIDS[rule])
        while waiting:
            for lr in waiting:
                loss = self.loss(rule, lr, aux or lr)
                if loss is not None:
                    losses[lr] = loss
            best = min(losses, key=losses.__getitem__, default=None)
            waiting = []
            if best is not None and len(losses) < MOST_RATES and best in (min(losses), max(losses)):
                beyond = best / 2 if best == min(losses) else best * 2
                waiting = [beyond] if self.may_run or self.loss(rule, beyond, aux or beyond) is not None else []
        return losses


def tokens_to(loss: float, ends: dict[int, float]) -> str:
    """Tokens of a whole run that ends at this loss, from the losses by steps."""
    points = sorted((end, math.log(steps * TOKENS)) for steps, end in ends.items())
    if loss < points[0][0]:
        return f"over {STEPS * TOKENS / 1000:.0f}k"
    if loss > points[-1][0]:
        return f"under {math.exp(points[-1][1]) / 1000:.0f}k"
    below, above = next((a, b) for a, b in itertools.pairwise(points) if a[0] <= loss <= b[0])
    share = (loss - below[0]) / (above[0] - below[0])
    return f"{math.exp(below[1] + share * (above[1] - below[1])) / 1000:.0f}k"


def race(results: Results, rules: list[str]) -> str:
    """Everything, in order of what others stand on; the table of what there is."""
    first = results.tuned("adamw", None)
    aux = min(first, key=first.__getitem__)
    tuned: dict[str, dict[float, float]] = {}
    best: dict[str, float] = {}
    ends: dict[str, list[float]] = {}
    for rule in rules:
        tuned[rule] = results.tuned(rule, None if rule == "adamw" else aux)
        if not tuned[rule]:
            continue
        lr = best[rule] = min(tuned[rule], key=tuned[rule].__getitem__)
        others = [results.loss(rule, lr, aux, STEPS, seed) for seed in range(1, SEEDS)] if rule in SEEDED else []
        ends[rule] = [tuned[rule][lr], *(loss for loss in others if loss is not None)]
    spreads = [statistics.variance(losses) for losses in ends.values() if len(losses) > 1]
    sigma = math.sqrt(statistics.mean(spreads)) if spreads else math.nan
    base, rows = ends.get("adamw", [first[aux]]), []
    for rule, lr in best.items():
        shorter = {int(share * STEPS): results.loss(rule, lr, aux, int(share * STEPS)) for share in SHARES}
        by_steps = {steps: loss for steps, loss in shorter.items() if loss is not None} | {STEPS: tuned[rule][lr]}
        tried = " ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(tuned[rule].items()))
        gain = statistics.mean(base) - statistics.mean(ends[rule])
        error = sigma * math.sqrt(1 / len(base) + 1 / len(ends[rule]))
        shown = f"{statistics.mean(ends[rule]):.4f}" + (
            f" ({min(ends[rule]):.4f} to {max(ends[rule]):.4f})" if len(ends[rule]) > 1 else ""
        )
        z = "" if rule == "adamw" else f"{gain:+.4f}, z = {gain / error:+.1f}"
        rows.append([rule, f"{lr:g}", shown, z, tokens_to(first[aux], by_steps), tried])
    rows.sort(key=lambda row: float(row[2].split()[0]))
    head = ["rule", "rate", "loss", "lower than AdamW by", "tokens to AdamW's loss", "rates tried: loss of seed 0"]
    count = sum(losses is not None for losses in (line["loss"] for line in results.lines))
    told = (
        f"{results.lines[0]['parameters']:,} parameters, {STEPS * TOKENS:,} tokens; {count} runs. The standard deviation of a "
        f"loss over seeds, pooled over {len(spreads)} rules, is {sigma:.4f}; z is the difference over its standard error, and "
        "3 or more is taken for real."
    )
    return markdown(head, rows) + "\n\n" + told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="file of the runs, one JSON line each")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table into docs/optimizers.md")
    parser.add_argument(
        "--rules", nargs="+", choices=GRIDS, default=list(GRIDS), help="these only; processes may share the file"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    table = race(Results(arguments.results, not arguments.table), arguments.rules)
    if arguments.table:
        page.PAGE.write_text(page.written(page.PAGE.read_text(), "race", table))
    else:
        print(table)


if __name__ == "__main__":
    main()
