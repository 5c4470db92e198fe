"""Pictures of a run, drawn from its history: the loss with what explains it, and the throughput."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from trainer.metrics.history import read

Record = dict[str, Any]


def loss_figure(history: Path, target: Path, title: str, unigram: float | None = None) -> None:
    """Training and validation bits per byte, and the learning rate below; skipped windows are marked.

    Args:
        history: a `metrics.jsonl`.
        target: the PNG to write.
        unigram: bits per byte of the validation tokens under their own unigram distribution.
    """
    records = read(history)
    steps = [r for r in records if "learning_rate_factor" in r]
    trained = [(r["step"], r["bits_per_byte"]) for r in steps if r["bits_per_byte"] is not None]
    skipped = [r["step"] for r in steps if r["bits_per_byte"] is None]
    validated = [(r["step"], r["validation_bits_per_byte"]) for r in records if "validation_bits_per_byte" in r]
    figure, (top, bottom) = _panels(title)
    if trained:
        x, y = zip(*trained, strict=True)
        top.plot(x, y, lw=0.7, color="tab:blue", alpha=0.35, label="training, each step")
        window = _window(len(x))
        if window > 1:
            middles = running_median(x, y, window)
            top.plot(*middles, lw=1.4, color="tab:blue", label=f"training, median of {window} steps")
    if validated:
        top.plot(*zip(*validated, strict=True), "o-", ms=4, lw=1.2, color="tab:orange", label="validation")
        step, value = validated[-1]
        top.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 9), ha="right")
    if unigram is not None:
        top.axhline(unigram, ls="--", lw=1, color="gray", label=f"unigram entropy, {unigram:.3f}")
    for number, step in enumerate(skipped):
        label = f"skipped: {len(skipped)} {'window' if len(skipped) == 1 else 'windows'}"
        top.axvline(step, lw=1, color="tab:red", alpha=0.6, label=label if number == 0 else None)
    _limits(top, [v for _, v in trained], [v for _, v in validated], unigram)
    top.set_ylabel("bits per byte")
    if top.get_legend_handles_labels()[0]:
        top.legend(loc="upper right")
    bottom.plot([r["step"] for r in steps], [r["learning_rate_factor"] for r in steps], lw=1.2, color="tab:green")
    bottom.set(ylabel="learning rate\n(of its peak)", ylim=(0, 1.08))
    _save(figure, target)


def throughput_figure(history: Path, target: Path, title: str) -> None:
    """Tokens per second of each step, and the share of it that rank 0 waited for data."""
    steps = [r for r in read(history) if r.get("data_seconds") is not None]
    figure, (top, bottom) = _panels(title)
    if steps:
        x = [r["step"] for r in steps]
        rates = [r["tokens_per_second"] / 1000 for r in steps]
        middle = statistics.median(rates)
        top.plot(x, rates, lw=0.7, color="tab:blue", alpha=0.6, label="each step")
        top.axhline(middle, ls="--", lw=1, color="gray", label=f"median, {middle:,.2f}")
        top.legend(loc="lower right")
        shares = [100 * r["data_seconds"] / r["seconds"] if r["seconds"] else 0.0 for r in steps]
        bottom.plot(x, shares, lw=0.8, color="tab:purple")
        total = 100 * sum(r["data_seconds"] for r in steps) / max(sum(r["seconds"] for r in steps), 1e-9)
        bottom.set_title(f"{total:.1f}% of all step time", fontsize=8, loc="right", pad=2)
    top.set(ylabel="thousand tokens/s", ylim=(0, None))
    bottom.set(ylabel="wait for data\n(% of a step)", ylim=(0, None))
    _save(figure, target)


def running_median(x: Any, y: Any, window: int) -> tuple[list[int], list[float]]:
    """Places and medians of the `window` values around them, several per window: enough to see, cheap for long runs."""
    places = range(0, len(x), max(1, window // 8))
    return [x[i] for i in places], [statistics.median(y[max(0, i - window // 2) : i + window // 2 + 1]) for i in places]


def _window(count: int) -> int:
    """A fortieth of the run, odd."""
    return count // 80 * 2 + 1


def _limits(axes: Any, trained: list[float], validated: list[float], unigram: float | None) -> None:
    """Leave out single spikes and the fall of the first steps, so that the rest of the curve can be read."""
    values = sorted(trained[len(trained) // 50 :])
    shown = [*values[: max(1, int(0.995 * len(values)))], *validated, *([unigram] if unigram is not None else [])]
    if shown:
        low, high = min(shown), max(shown)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _panels(title: str) -> Any:
    """A figure of a tall and a flat panel over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), dpi=120, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.08}
    )
    panels[0].set_title(title)
    panels[1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, target: Path) -> None:
    import matplotlib.pyplot as plt

    target.parent.mkdir(parents=True, exist_ok=True)
    figure.align_ylabels()
    figure.savefig(target, bbox_inches="tight")
    plt.close(figure)
