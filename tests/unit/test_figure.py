"""The pictures show what the history says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics import figure as figures
from trainer.metrics.figure import loss_figure, running_median, throughput_figure


def written(path: Path, steps: int, bad: tuple[int, ...] = (), spike: int | None = None) -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        value = None if step in bad else 90.0 if step == spike else 1.5 + 3 / step
        lines.append({"step": step, "bits_per_byte": value, "learning_rate_factor": 1 - step / (steps + 1),
                      "tokens_per_second": 1000.0 * step, "seconds": 2.0, "data_seconds": 0.5})  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "validation_bits_per_byte": 1.5 + 3 / step})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figure that is about to be saved."""
    kept = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, target: (kept.append(figure), save(figure, target)))
    return kept


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_the_loss_figure_has_both_losses_the_rate_and_the_skips(tmp_path, drawn) -> None:
    history = written(tmp_path / "metrics.jsonl", 200, bad=(70, 71), spike=120)
    loss_figure(history, tmp_path / "figures/loss.png", "run", 3.0)
    top, bottom = drawn[0].axes
    assert labels(top) == [
        "training, each step", "training, median of 5 steps", "validation", "unigram entropy, 3.000", "skipped: 2 windows",
    ]  # fmt: skip
    marks = [line.get_xdata()[0] for line in top.lines if len(line.get_xdata()) == 2 and line.get_color() == "tab:red"]
    assert marks == [70, 71]
    assert next(iter(bottom.lines[0].get_ydata())) == pytest.approx(1 - 1 / 201)
    low, high = top.get_ylim()
    assert low < 1.5 + 3 / 200
    assert 3.0 < high < 10  # the spike does not flatten the curve
    assert (tmp_path / "figures/loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_throughput_figure_has_rate_and_wait(tmp_path, drawn) -> None:
    throughput_figure(written(tmp_path / "metrics.jsonl", 9), tmp_path / "t.png", "run")
    top, bottom = drawn[0].axes
    assert list(top.lines[0].get_ydata()) == pytest.approx(list(range(1, 10)))
    assert labels(top) == ["each step", "median, 5.00"]
    assert list(bottom.lines[0].get_ydata()) == [25.0] * 9
    assert "25.0%" in bottom.get_title(loc="right")


@pytest.mark.parametrize(("steps", "bad"), [(0, ()), (1, ()), (2, (1, 2)), (3, (1,))])
def test_short_and_hopeless_runs_have_figures_too(tmp_path, drawn, steps, bad) -> None:
    history = written(tmp_path / "metrics.jsonl", steps, bad)
    for number, draw in enumerate((loss_figure, throughput_figure)):
        draw(history, tmp_path / f"{number}.png", "run")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_the_running_median_ignores_one_spike_and_is_centered() -> None:
    x, y = list(range(100)), [float(i) for i in range(100)]
    y[50] = 1e9
    places, middles = running_median(x, y, 9)
    assert places == x
    assert middles[50] == pytest.approx(50, abs=1)
    assert middles[20] == 20
    places, _ = running_median(list(range(10_000)), [0.0] * 10_000, 251)
    assert len(places) < 400
