"""More tables of docs/optimizers.md: what is true about ROOT, AuON, DCT-AdamW and Trion.

    python benchmarks/family_tables.py                    write the tables that need no run, in a minute
    python benchmarks/family_tables.py --export FOLDER    also the one on real gradients: FOLDER is the `export` of a run

One thread; fixed seeds; float64 where nothing else is said.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import optimizer_tables as page
from benchmarks.optimizer_tables import gaussian_spectrum, markdown, shown
from trainer import optim
from trainer.optim import dct
from trainer.optim.polar import Schedule, reference
from trainer.optim.root import clipped
from trainer.optim.root_tables import PUBLISHED, for_shape

SEEDS = 5


def left(of: Schedule, sigma: np.ndarray) -> float:
    """Mean of (f(sigma) - 1)^2 over singular values."""
    safety, steps = of
    sigma = sigma / (safety * np.sqrt(np.sum(sigma**2)))
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return float(np.mean((sigma - 1) ** 2))


def root_table() -> str:
    """ROOT's coefficients by shape against schedules that know no shape."""
    rows = []
    for name in ("published", "fitted", "simple", "quintic", "polar-express", "cans"):
        cells = [shown(left(for_shape(name, *shape), gaussian_spectrum(*shape))) for shape in PUBLISHED]
        for shape in PUBLISHED:
            cells.append(shown(left(for_shape(name, *shape), np.arange(1, 1025.0) ** -1)))
        rows.append([f"`{name}`", *cells])
    shapes = [f"{short}x{long}" for short, long in PUBLISHED]
    return markdown(["coefficients", *shapes, *(f"i^-1, as {s}" for s in shapes)], rows)


# ------------------------------------------------------------------------------------- outliers in the momentum
OUTLIERS = [(0.0, 0), (1e-4, 30), (1e-3, 30), (1e-3, 100), (1e-2, 10), (1e-2, 30)]  # share of entries, in deviations
CLIPPED: list[tuple[str, dict[str, Any]]] = [
    ("not clipped", {"quantile": 1.0, "clip": "always", "outlier": 6.0}),
    *((f"q = {q}", {"quantile": q, "clip": "always", "outlier": 6.0}) for q in (0.999, 0.99, 0.95, 0.9, 0.8)),
    ("q = 0.9, `clip: outliers`", {"quantile": 0.9, "clip": "outliers", "outlier": 6.0}),
]


def signal(seed: int) -> tuple[Tensor, torch.Generator]:
    """256 x 512 of a power-law spectrum i^-1, and noise of a tenth of its norm."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(draw(256, 256))[0], torch.linalg.qr(draw(512, 256))[0]
    clean = left * torch.arange(1.0, 257.0, dtype=torch.float64) ** -1 @ right.mT
    noise = draw(256, 512)
    return clean / clean.norm() + 0.1 * noise / noise.norm(), generator


def outlier_table() -> str:
    """Cosine between the polar factors of a matrix with outliers, clipped, and without."""
    rows = []
    for share, size in OUTLIERS:
        cosines: list[list[float]] = [[] for _ in CLIPPED]
        for seed in range(SEEDS):
            clean, generator = signal(seed)
            struck = torch.rand(clean.shape, generator=generator, dtype=torch.float64) < share
            signs = torch.randn(clean.shape, generator=generator, dtype=torch.float64).sign()
            sick = torch.where(struck, size * clean.square().mean().sqrt() * signs, clean)
            wanted = reference(clean[None], "8+2")
            for found, (_, options) in zip(cosines, CLIPPED, strict=True):
                other = reference(clipped(sick[None], options), "8+2")
                found.append(float((wanted * other).sum() / (wanted.norm() * other.norm())))
        title = f"{share:g} of entries, {size} sigma" if share else "none"
        rows.append([title, *(f"{statistics.median(values):.3f}" for values in cosines)])
    return markdown(["outliers", *(name for name, _ in CLIPPED)], rows)


# ------------------------------------------------------------------------------------------------------- memory
LAYERS, WIDTH, FFN = 8, 512, 1376  # hidden matrices of the 60M Llama
RANKS = (32, 64, 128)


def memory_table() -> str:
    """Measured bytes of state of all hidden matrices, in fp32."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH)] * 2 + [(WIDTH, FFN)]

    def state(kind: str, **options: Any) -> int:
        weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = getattr(optim, kind)(weights, **options)
        return LAYERS * sum(t.nbytes for state in optimizer.state.values() for t in state.values())

    rules: list[tuple[str, str, dict[str, Any]]] = [
        *((kind, kind, {}) for kind in ("AdamW", "Muon", "NorMuon", "ROOT", "AuON", "HybridAuON")),
        *((f"Trion, r = {r}", "Trion", {"rank": r}) for r in RANKS),
        *(
            (f"DCT-AdamW, r = {r}, error feedback {form}", "DCTAdamW", {"rank": r, "error_feedback": form})
            for form in ("none", "4-bit", "8-bit", "fp32")
            for r in RANKS
        ),
    ]
    entries = LAYERS * sum(m * n for m, n in shapes)
    rows = [
        [title, f"{(taken := state(kind, **options)) / 1e6:.1f}", f"{taken / entries:.2f}"]
        for title, kind, options in rules
    ]
    return markdown(["optimizer", "state, MB", "bytes per parameter"], rows)


# -------------------------------------------------------------------------------------- energy in real gradients
def gradients(
    model: Any, tokenizer: Any, batches: int = 4, rows: int = 8, length: int = 256
) -> dict[str, list[Tensor]]:
    """Gradients of the hidden matrices on source text of the standard library, by kind of matrix."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / name).read_text() for name in ("argparse.py", "tarfile.py", "typing.py", "inspect.py"))
    tokens = torch.tensor(tokenizer(text)["input_ids"])[: batches * rows * length].view(batches, rows, length)
    found: dict[str, list[Tensor]] = {}
    for batch in tokens:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                found.setdefault(name.split(".")[-2], []).append(weight.grad.double().clone())
    return found


def kept(rows: Tensor, basis: Tensor, rank: int) -> float:
    """Share of the sum of squares of (l, s) in its best `rank` columns in a basis (s, s) of rows."""
    squares = (rows @ basis.mT).square().sum(0)
    return float(squares.topk(rank).values.sum() / squares.sum())


def energies(gradient: Tensor, rank: int, generator: torch.Generator) -> list[float]:
    """By SVD, DCT, DCT of permuted columns, a random orthogonal basis, and columns as they are."""
    rows = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.mT
    size = rows.shape[1]
    values = torch.linalg.svdvals(rows).square()
    q = dct.basis(size, torch.float64, rows.device)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    mixed = rows[:, torch.randperm(size, generator=generator)]
    bases = [(rows, q), (mixed, q), (rows, turned), (rows, torch.eye(size, dtype=torch.float64))]
    return [float(values[:rank].sum() / values.sum()), *(kept(r, basis, rank) for r, basis in bases)]


def energy_table(export: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trained, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export))
    generator, rows = torch.Generator().manual_seed(0), []
    for when, model in (("start", fresh), ("end of the run", trained)):
        for kind, found in gradients(model, tokenizer).items():
            size = min(found[0].shape)
            for rank in (size // 6, size // 3):
                shares = [energies(gradient, rank, generator) for gradient in found]
                medians = [statistics.median(column) for column in zip(*shares, strict=True)]
                rows.append([when, f"{kind}, {size}", str(rank), *(f"{m:.3f}" for m in medians)])
    return markdown(["when", "matrix, short side", "r", "SVD", "DCT", "DCT, permuted", "random", "as they are"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--export", type=Path, help="export of a run, for the table on real gradients")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, Callable[[], str]] = {"root": root_table, "outliers": outlier_table, "memory": memory_table}
    if arguments.export:
        tables["energy"] = partial(energy_table, arguments.export)
    text = page.PAGE.read_text()
    for name, table in tables.items():
        text = page.written(text, name, table())
    page.PAGE.write_text(text)


if __name__ == "__main__":
    main()
