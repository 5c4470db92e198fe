"""A sink that fails, hangs or is missing costs the run nothing but one sentence."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tests.unit.test_sinks import attempt, settings
from trainer.metrics import follow as follows
from trainer.metrics.follow import numbers, redacted
from trainer.metrics.sinks import tensorboard
from trainer.outcome import RunError

ONE = [{"name": "tensorboard"}]


class Recorder:
    """A sink in memory that fails at one step, or when it is opened."""

    taken: list[tuple[int, float]] = []
    fail_at: int | None = None
    fail_open = False

    def __init__(self, options, target) -> None:
        if self.fail_open:
            raise ConnectionError("no route to https://me:hunter22@host/api with key swordfish1")
        self.id = "given"

    def write(self, step: int, values: dict[str, float]) -> None:
        if step == self.fail_at:
            raise ConnectionError("lost")
        self.taken.append((step, values.get("loss", -1.0)))

    def flush(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    class Fresh(Recorder):
        taken: list[tuple[int, float]] = []

    monkeypatch.setattr(tensorboard, "Sink", Fresh)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text(json.dumps({"name": "r", "created": 1.0}))
    return tmp_path / "r"


def test_a_sink_that_fails_says_so_once_and_the_next_attempt_catches_up(folder, monkeypatch) -> None:
    sink = tensorboard.Sink
    monkeypatch.setattr(sink, "fail_at", 3)
    told = attempt(folder, ONE, 0, 6, 0.0)
    assert len(told) == 1
    assert told[0].startswith("sink tensorboard failed")
    assert "ConnectionError: lost" in told[0]
    assert [step for step, _ in sink.taken] == [1, 2]
    assert (folder / "metrics.jsonl").read_text().count("\n") == 7
    monkeypatch.setattr(sink, "fail_at", None)
    assert attempt(folder, ONE, 6, 8, 0.0) == []
    assert [step for step, _ in sink.taken] == [1, 2, 3, 4, 4, 5, 6, 7, 8]


def test_a_sink_that_cannot_open_says_why_without_its_secrets(folder, monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "swordfish1")
    monkeypatch.setattr(tensorboard.Sink, "fail_open", True)
    (told,) = attempt(folder, ONE, 0, 3, 0.0)
    assert "no route to https://***@host/api with key ***" in told


def test_a_sink_that_hangs_holds_up_neither_the_run_nor_its_end(folder, monkeypatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("trainer.metrics.history.PATIENCE", 0.2)  # a minute, otherwise
    monkeypatch.setattr(tensorboard.Sink, "write", lambda *_: release.wait(60))
    began = time.monotonic()
    (told,) = attempt(folder, ONE, 0, 6, 0.0)
    release.set()
    assert time.monotonic() - began < 5
    assert "is left behind" in told
    assert (folder / "metrics.jsonl").read_text().count("\n") == 7


def test_a_sink_that_takes_back_gets_replayed_steps_again_and_another_one_not(folder, monkeypatch) -> None:
    sink = tensorboard.Sink
    attempt(folder, ONE, 0, 6, 0.0)
    monkeypatch.setattr(tensorboard, "REWINDS", False)
    attempt(folder, ONE, 4, 7, 0.5)
    assert sink.taken[-2:] == [(6, 4.0), (7, 3.5)]
    monkeypatch.setattr(tensorboard, "REWINDS", True)
    attempt(folder, ONE, 4, 7, 0.25)
    assert sink.taken[-4:] == [(7, 3.5), (5, 5.25), (6, 4.25), (7, 3.25)]


def test_an_unreadable_count_sends_all_again(folder) -> None:
    sink = tensorboard.Sink
    attempt(folder, ONE, 0, 2, 0.0)
    (folder / "sinks/tensorboard.json").write_text('{"id": "gi')
    attempt(folder, ONE, 2, 3, 0.0)
    assert [step for step, _ in sink.taken] == [1, 2, 1, 2, 3]


def test_missing_packages_and_doubles_are_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(RunError, match="given twice"):
        follows.check(settings(tmp_path, [*ONE, *ONE]))
    for name in ("tensorboard", "wandb", "mlflow"):
        follows.check(settings(tmp_path, [{"name": name}]))
        with monkeypatch.context() as patch:
            patch.setattr(follows, "_installed", lambda package: False)
            with pytest.raises(RunError) as caught:
                follows.check(settings(tmp_path, [{"name": name}]))
        assert "not installed" in caught.value.what
        assert caught.value.mend == f"pip install 'orthogon[{name}]'"


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "somesink").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not follows._installed("somesink")
    assert follows._installed("tensorboard")


def test_numbers_are_finite_and_sections_become_paths() -> None:
    record = {"step": 3, "loss": None, "a": 1, "b": float("nan"), "c": "text", "groups": {"m": {"x": 2.5, "y": None}}}
    assert numbers(record) == {"a": 1.0, "groups/m/x": 2.5}


def test_short_values_of_secret_variables_are_left_alone(monkeypatch) -> None:
    """A key `1` would blacken every 1 of a message."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "1")
    assert redacted("line 1\n of 11") == "line 1 of 11"
