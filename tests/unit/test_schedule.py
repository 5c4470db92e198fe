"""Schedules at both ends, and what a run derives from its configuration."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import config as configuration
from trainer.config import ScheduleConfig
from trainer.data.stream import Part, Stream
from trainer.derive import derive
from trainer.outcome import RunError
from trainer.schedule import factor

ROOT = Path(__file__).parents[2]
NAMES = ("constant", "cosine", "linear", "wsd", "1-sqrt")


@pytest.mark.parametrize("name", NAMES)
@given(steps=st.integers(1, 400), warmup=st.floats(0, 1), decay=st.floats(0, 1), floor=st.floats(0, 1))
def test_factor_is_positive_bounded_and_falls_after_warmup(name, steps, warmup, decay, floor) -> None:
    schedule = ScheduleConfig(name=name, warmup=warmup, decay=decay, floor=floor)
    values = [factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    top = round(warmup * steps)
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_both_ends_exactly() -> None:
    linear = ScheduleConfig(name="linear", warmup=0.1, floor=0.0)
    assert [factor(linear, s, 100) for s in (0, 9)] == [0.1, 1.0]
    assert factor(linear, 10, 100) == pytest.approx(90 / 91)
    assert factor(linear, 99, 100) == pytest.approx(1 / 91)
    wsd = ScheduleConfig(name="wsd", warmup=0.0, decay=0.2, floor=0.1)
    assert [factor(wsd, s, 10) for s in (0, 7)] == [1.0, 1.0]
    assert factor(wsd, 8, 10) == pytest.approx(0.1 + 0.9 * 2 / 3)
    assert factor(wsd, 9, 10) == pytest.approx(0.1 + 0.9 / 3)
    root = ScheduleConfig(name="1-sqrt", warmup=0.0, decay=0.2)
    assert factor(root, 9, 10) == pytest.approx(1 - (2 / 3) ** 0.5)
    cosine = ScheduleConfig(name="cosine", warmup=0.0)
    assert factor(cosine, 49, 99) == pytest.approx(0.5)
    assert factor(ScheduleConfig(name="constant", warmup=0.0), 99, 100) == 1.0


def test_derived_values_follow_from_tokens_and_ranks() -> None:
    config = configuration.load(
        ROOT / "configs/quickstart.yaml", ["--train.tokens_per_step=8192", "--data.sequence_length=256"]
    )
    data = Stream({"data": Part(SimpleNamespace(sequences=1000), Fraction(1))}, 0)
    for world, micro_steps, rows in ((1, 4, 8), (2, 2, 8), (3, 2, 6), (5, 1, 7)):
        derived = derive(config, world, data)
        assert (derived.sequences_per_step, derived.micro_steps, derived.rows) == (32, micro_steps, rows)
        assert world * micro_steps * rows >= 32
    with pytest.raises(RunError, match="33 ranks share a step of 32"):
        derive(config, 33, data)
    epochs = replace(config, train=replace(config.train, length="2.5 epochs"))
    derived = derive(epochs, 1, data)
    assert (derived.sequences, derived.steps, derived.available) == (2500, 79, 2500)
    limited = replace(epochs, data=replace(config.data, max_epochs=2))
    assert derive(limited, 1, data).available == 2000
