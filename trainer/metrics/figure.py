"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from trainer.metrics.history import read


def loss_figure(history: Path, target: Path, title: str, unigram: float | None = None) -> None:
    """Draw training and validation bits per byte over the steps into `target` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(history)
    train = [(r["step"], r["bits_per_byte"]) for r in records if r.get("bits_per_byte") is not None]
    validation = [(r["step"], r["validation_bits_per_byte"]) for r in records if "validation_bits_per_byte" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*zip(*train, strict=True), lw=0.8, color="tab:blue", alpha=0.7, label="training, each step")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", ms=4, color="tab:orange", label="validation")
        step, value = validation[-1]
        axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(-4, 8), ha="right")
    if unigram is not None:
        axes.axhline(unigram, ls="--", lw=1, color="gray", label=f"unigram entropy, {unigram:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)
