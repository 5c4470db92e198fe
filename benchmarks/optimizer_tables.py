"""The tables of docs/optimizers.md, computed and written between their marker comments.

One thread; fixed seeds; the same text on each run (the measured tables: on one kind of processor).

    python benchmarks/optimizer_tables.py              write all tables, in some minutes
    python benchmarks/optimizer_tables.py --check      are the tables that need no measurement current? seconds, no torch
    python benchmarks/optimizer_tables.py --peer PATH  print what microsoft/dion's own function gives on the same inputs
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.optim import normuon, polar
from trainer.optim.plan import Stored, imbalance, own, traffic, work
from trainer.registry import lazy

torch: Any = lazy("torch")

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"

# --------------------------------------------------------------------------------------- bytes and balance
# Layers, width, width of k and v, width of the feed-forward network: the hidden matrices of Llamas.
MODELS = {
    "60M (8 x 512)": (8, 512, 512, 1376),
    "Llama-3.2-1B": (16, 2048, 512, 8192),
    "Llama-3-8B": (32, 4096, 1024, 14336),
    "Llama-3-70B": (80, 8192, 1024, 28672),
}
RANKS = (2, 8, 64, 128, 256)
WIDTH = 2  # bytes of an entry on the way: bf16


def padded(shapes: list[tuple[int, int]], ranks: int) -> tuple[float, float]:
    """(bytes sent by each rank, work of each rank over the mean of the real work) in dion's scheme: per shape, as many
    zero matrices as make their number a multiple of the ranks, and shards padded to equal heights."""
    batches = {shape: math.ceil(shapes.count(shape) / ranks) for shape in shapes}
    sent = sum(2 * n * math.ceil(m / ranks) * k * (ranks - 1) * WIDTH for (m, k), n in batches.items())
    return sent, sum(n * work(shape) for shape, n in batches.items()) * ranks / sum(map(work, shapes))


@cache
def planned(model: str, ranks: int) -> dict[str, float]:
    """What one step moves and how the work is divided, by `trainer.optim.plan` alone. Bytes count one direction."""
    layers, d, kv, ffn = MODELS[model]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)] * layers  # q k v o, gate, up, down
    parameters = [Stored((1, *shape), 1) for shape in shapes]  # rows sharded, as FSDP2 does by default
    matrices = own(parameters, ranks)
    sent = [max(pair) for pair in traffic(parameters, matrices, ranks, WIDTH)]
    in_turn = [replace(m, owner=m.parameter % ranks) for m in matrices]
    ideal = sum(2 * m * n / ranks * (1 - 1 / ranks) * WIDTH for m, n in shapes)
    peer_bytes, peer_work = padded(shapes, ranks)
    bound = max(1.0, max(map(work, shapes)) * ranks / sum(map(work, shapes)))
    return {
        "MB: mean": sum(sent) / ranks / 1e6, "MB: most": max(sent) / 1e6, "MB: optimum": ideal / 1e6,
        "MB: dion": peer_bytes / 1e6, "work: ours": imbalance(matrices, ranks), "work: bound": bound,
        "work: in turn": imbalance(in_turn, ranks), "work: dion": peer_work,
    }  # fmt: skip


def plan_table() -> str:
    plans = {(model, ranks): planned(model, ranks) for model in MODELS for ranks in RANKS}
    rows = [
        [m, str(r), *(f"{v:.1f}" if "MB" in k else f"{v:.2f}" for k, v in p.items())] for (m, r), p in plans.items()
    ]
    head = ["model", "ranks", *planned(*next(iter(plans)))]
    mean, most = (max(p[key] / p["MB: optimum"] for p in plans.values()) for key in ("MB: mean", "MB: most"))
    return (
        f"{markdown(head, rows)}\n\nOver all rows, the mean rank sends at most {mean:.3f}x of the optimum, the busiest rank "
        f"at most {most:.2f}x."
    )


# ---------------------------------------------------------------------- orthogonality, in exact arithmetic
SHAPES = [(2048, 2048), (2048, 3072), (2048, 8192), (2048, 16384), (4096, 4096), (4096, 14336)]
POWERS = (0.5, 1.0, 1.5)
DEFAULT, FOUR = ("polar-express", "frobenius"), ("quintic-4", "schatten")
PRESETS = [(name, prescale) for name in polar.COEFFICIENTS for prescale in ("frobenius", "schatten")]
Preset = tuple[str, str]  # coefficients, prescale
FLOOR = 1e-9  # of the errors shown


def gaussian_spectrum(rows: int, columns: int) -> np.ndarray:
    """Singular values of a Gaussian matrix, up to a factor: the (i - 1/2)/s quantiles of the Marchenko-Pastur law."""
    short, ratio = min(rows, columns), min(rows / columns, columns / rows)
    angle = (np.arange(2**16) + 0.5)[::-1] * np.pi / 2**16  # squared singular values 1 + y + 2 sqrt(y) cos(angle)
    squared = 1 + ratio + 2 * np.sqrt(ratio) * np.cos(angle)
    density = np.sin(angle) ** 2 / squared
    below = np.cumsum(density) - density / 2
    return np.interp((np.arange(short) + 0.5) / short, below / density.sum(), np.sqrt(squared))


def polynomial_error(sigma: np.ndarray, name: str, prescale: str) -> float:
    """Mean over the singular values of (f(sigma) - 1)^2, in float64."""
    safety, steps = polar.COEFFICIENTS[name]
    sigma = sigma / np.sqrt(np.sum(sigma**2))
    sigma = sigma / (safety * (1.0 if prescale == "frobenius" else np.sum(sigma**4) ** 0.25))
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return float(np.mean((sigma - 1) ** 2))


@cache
def polynomial_errors() -> dict[Preset, dict[str, float]]:
    """Preset -> input -> error."""
    inputs = {f"{m}x{n}": gaussian_spectrum(m, n) for m, n in SHAPES}
    inputs |= {f"i^-{p:g}": np.arange(1, 1025.0) ** -p for p in POWERS}
    return {preset: {key: polynomial_error(s, *preset) for key, s in inputs.items()} for preset in PRESETS}


def title(preset: Preset) -> str:
    return f"`{preset[0]}`" + (", schatten" if preset[1] == "schatten" else "")


def shown(error: float, digits: int = 1) -> str:
    return f"{error:.{digits}e}".replace("e-0", "e-") if error >= FLOOR else f"<{FLOOR:.0e}".replace("e-0", "e-")


def verdict(errors: dict[Preset, dict[str, float]], among: str) -> str:
    """Which presets are no worse than dion's default, and where the one of four steps is."""
    limit = errors[DEFAULT]
    good = [title(p) for p, e in errors.items() if p != DEFAULT and all(e[k] <= limit[k] for k in limit)]
    holds, fails = ([k for k in limit if (errors[FOUR][k] <= limit[k]) is yes] for yes in (True, False))
    return (
        f"no worse than {title(DEFAULT)} in {among}: {'; '.join(good)}. The four steps of {title(FOUR)} are no worse on "
        f"{', '.join(holds)}; worse on {', '.join(fails) or 'none'}."
    )


def polynomial_table() -> str:
    errors = polynomial_errors()
    rows = []
    for preset, row in errors.items():
        cells = [f"**{shown(e)}**" if e <= errors[DEFAULT][key] else shown(e) for key, e in row.items()]
        rows.append([title(preset), str(len(polar.COEFFICIENTS[preset[0]][1])), *cells])
    return f"{markdown(['coefficients', 'steps', *errors[DEFAULT]], rows)}\n\nIn float64, {verdict(errors, 'every column')}"


# ------------------------------------------------------------------------------ orthogonality, as computed
MEASURED = [p for p in PRESETS if p[1] == "frobenius" and p[0] != FOUR[0]]
MEASURED += [(name, "schatten") for name in ("polar-express", "quintic", FOUR[0])]


def inputs() -> Iterator[tuple[str, Any]]:
    """(name, float64 matrix): Gaussian, and with power-law singular values between the factors of a Gaussian one."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((512, 512), (512, 1376)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield f"Gaussian {shape[0]}x{shape[1]}", x
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    for power in POWERS[:2]:
        sigma = torch.arange(1, 513, dtype=torch.float64) ** -power
        yield f"i^-{power:g} 512x1376", u * sigma @ v


def figures(o: Any, exact: Any) -> tuple[float, float]:
    """Of a computed polar factor: mean over its singular values of (sigma - 1)^2, relative distance from the polynomial."""
    o = o.double()
    return float((torch.linalg.svdvals(o) - 1).square().mean()), float((o - exact).norm() / exact.norm())


def forms(x: Any, name: str, prescale: str) -> dict[str, Any]:
    """What `polar` makes of a matrix in each precision and form."""
    x, sent = x.float()[None], x.bfloat16()[None]  # sent: as matrices travel to and from fp16 products
    return {
        "bf16": polar.polar(x, name, torch.bfloat16, "standard", prescale),
        "fp16": polar.polar(x, name, torch.float16, "standard", prescale),
        "fp16, sent as bf16": polar.polar(sent, name, torch.float16, "standard", prescale).bfloat16(),
        "fp32": polar.polar(x, name, torch.float32, "standard", prescale),
        "Gram, fp32": polar.polar(x, name, torch.float32, "gram", prescale),
    }


def measured_table() -> str:
    torch.set_num_threads(1)
    errors: dict[str, dict[Preset, dict[str, float]]] = {}  # form -> preset -> input
    offs: dict[str, dict[str, list[float]]] = {}  # input -> form -> over presets
    for key, x in inputs():
        for preset in MEASURED:
            exact = polar.reference(x[None], *preset)
            for form, o in {"exact": exact, **forms(x, *preset)}.items():
                errors.setdefault(form, {}).setdefault(preset, {})[key], off = figures(o, exact)
                offs.setdefault(key, {}).setdefault(form, []).append(off)
    exact, half = errors["exact"], errors["bf16"]
    rows = [[title(p), *(shown(e[p][key]) for key in offs for e in (exact, half))] for p in MEASURED]
    head = ["coefficients", *(f"{key}, {form}" for key in offs for form in ("exact", "bf16"))]
    far = {f: max(abs(e[p][k] - exact[p][k]) for p in MEASURED for k in offs) for f, e in errors.items()}
    others = "; ".join(f"{form} {shown(far[form], 0)}" for form in list(offs[key])[2:])
    ranges = {key: [f"{shown(min(v), 0)} to {shown(max(v), 0)}" for v in row.values()] for key, row in offs.items()}
    return (
        f"{markdown(head, rows)}\n\nThe errors of the other forms differ from the exact ones by at most: {others}. In bf16, "
        f"{verdict(half, 'every column')}\n\nDistance from the polynomial, least to most over these coefficients:\n\n"
        f"{markdown(['matrix', *list(offs[key])[1:]], [[key, *cells[1:]] for key, cells in ranges.items()])}"
    )


def print_peer(path: str) -> None:
    sys.path.insert(0, path)
    from dion.polar_express import polar_express  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    for key, x in inputs():
        exact, ours = polar.reference(x[None], *DEFAULT), polar.polar(x.float()[None], DEFAULT[0], torch.bfloat16)
        for name, o in (("dion", polar_express(x.float()[None])), ("ours", ours)):
            print(f"{key}, {name}: error {figures(o, exact)[0]:.2e}, off {figures(o, exact)[1]:.1e}")


# ---------------------------------------------------------------------------------------- a norm per shard
PARTS, SEEDS = (4, 16, 64), 5
CASES: list[tuple[tuple[int, int], str, float]] = [((1024, 256), "8+2", spread) for spread in (0.0, 0.5, 1.0)]
CASES += [(shape, "polar-express", 1.0) for shape in ((1024, 256), (1376, 512), (512, 512), (256, 1024))]
CASES += [((256, 1024), "8+2", 1.0)]


def per_shard(shape: tuple[int, int], name: str, spread: float, seed: int) -> list[tuple[float, float, float]]:
    """For each number of shards: the difference of the 12th update whose norm is restored shard by shard from the exact
    one, relative, and the least and the largest factor that a shard is off by. float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(spread * torch.randn(shape[0], 1, generator=generator, dtype=torch.float64))
    group = asdict(normuon.Options(lr=1.0, scale="shape", restore="norm", polar=name))
    w = torch.zeros(shape, dtype=torch.float64)
    state = {"momentum": w.clone(), "mean_square": torch.zeros_like(scales)}
    for _ in range(12):
        gradient = scales * torch.randn(shape, generator=generator, dtype=torch.float64)
        moved, state = normuon.reference(w, gradient, state, group)
    o = polar.reference(state["momentum"], name)
    h = o / (state["mean_square"].sqrt() + group["eps"])
    exact = h * (o.norm() / h.norm())
    step = (w - moved) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(step, exact, atol=1e-12), "the exact update is that of the rule's reference"
    result = []
    for parts in PARTS:
        height = math.ceil(shape[0] / parts)
        local = torch.cat([b * (a.norm() / b.norm()) for a, b in zip(o.split(height), h.split(height), strict=True)])
        factors = local.norm(dim=1) / exact.norm(dim=1)
        result.append((float((local - exact).norm() / exact.norm()), float(factors.min()), float(factors.max())))
    return result


def shard_table() -> str:
    torch.set_num_threads(1)
    rows = []
    for shape, name, spread in CASES:
        runs = [per_shard(shape, name, spread, seed) for seed in range(SEEDS)]
        percents = [[100 * run[index][0] for run in runs] for index in range(len(PARTS))]
        cells = [f"{statistics.median(p):.1f} ({min(p):.1f} to {max(p):.1f})" for p in percents]
        least, most = min(run[-1][1] for run in runs), max(run[-1][2] for run in runs)
        rows.append([f"{shape[0]}x{shape[1]}", f"`{name}`", f"{spread:g}", *cells, f"{least:.2f} to {most:.2f}"])
    head = ["matrix", "coefficients", "spread", *(f"{p} shards, %" for p in PARTS), f"factors, {PARTS[-1]} shards"]
    return markdown(head, rows)


# ------------------------------------------------------------------------------------------------ the page
CHEAP: dict[str, Callable[[], str]] = {"plan": plan_table, "polynomial": polynomial_table}
TABLES: dict[str, Callable[[], str]] = CHEAP | {"measured": measured_table, "shards": shard_table}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def written(page: str, name: str, table: str) -> str:
    """The page with a table between `<!-- table: NAME -->` and `<!-- end -->`."""
    before, opening, rest = page.partition(f"<!-- table: {name} -->\n")
    old, closing, after = rest.partition("<!-- end -->")
    if not opening or not closing or "<!-- table" in old:
        raise SystemExit(f"{PAGE.name} has no `<!-- table: {name} -->` followed by `<!-- end -->`; put both there")
    return f"{before}{opening}{table}\n{closing}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a cheap table is not current")
    parser.add_argument("--peer", help="checkout of microsoft/dion; print its figures, change nothing")
    arguments = parser.parse_args()
    if arguments.peer:
        return print_peer(arguments.peer)
    made = {name: table() for name, table in (CHEAP if arguments.check else TABLES).items()}
    page = PAGE.read_text()
    for name, table in made.items():
        new = written(page, name, table)
        if arguments.check and new != page:
            raise SystemExit(f"table '{name}' of docs/{PAGE.name} is not current; run `make tables`")
        page = new
    if not arguments.check:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
