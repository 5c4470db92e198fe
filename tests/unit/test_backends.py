"""What every backend promises (`launch/backends/__init__.py`), tried on all that there are, with stand-ins for the outside."""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest

from launch import attempt, backends, handles
from tests.unit.fakes import Fake
from trainer import config as configuration
from trainer import runfolder
from trainer.config import RunConfig
from trainer.files import write_json
from trainer.outcome import Outcome, RunError, write_outcome

ROOT = Path(__file__).parents[2]
RESERVED = {"name", "runs", "seed", "on", "cluster", "after", *(f.name for f in dataclasses.fields(RunConfig))}


def test_backends_are_found_by_their_files_and_unknown_ones_named_with_the_nearest() -> None:
    assert "torchrun" in backends.names()
    with pytest.raises(RunError, match="there is no backend 'torchrum'") as error:
        backends.find("torchrum")
    assert (error.value.mend, error.value.outcome.code) == ("did you mean torchrun?", 78)


@pytest.fixture(params=backends.names())
def place(request, tmp_path, monkeypatch) -> tuple[Any, Fake, RunConfig, Path]:
    """A backend with its stand-in, and a run whose folder is made."""
    try:
        stand_in = importlib.import_module(f"tests.unit.fakes.{request.param}")
    except ModuleNotFoundError:
        pytest.fail(f"tests/unit/fakes/{request.param}.py is missing")
    made = stand_in.fake(tmp_path, monkeypatch)
    config = configuration.load(ROOT / "configs/quickstart.yaml", [f"--runs={tmp_path}/runs", "--name=r"])
    folder = runfolder.create(config, ["test"])
    return backends.find(request.param), made, config, folder


def submitted(place, **more: Any) -> dict[str, Any]:
    backend, made, config, folder = place
    handle = backend.submit(config, folder, backend.Options(**made.options), **{"resume": False} | more)
    assert json.loads(json.dumps(handle)) == handle, "a handle holds JSON values"
    assert not {"backend", "options", "submitted", "attempts"} & handle.keys()
    write_json(
        folder / handles.FILE, {"backend": backend.__name__.rpartition(".")[2], "options": {}, "attempts": 0, **handle}
    )
    return handle


def logged(folder: Path, outcome: Outcome) -> None:
    """An attempt as it is when the supervisor has put it on record."""
    logs = folder / "logs/1"
    logs.mkdir()
    (logs / "rank-1.log").write_text("of one\n")
    (logs / "rank-0.log").write_text("of zero\n")
    write_outcome(logs, outcome, "as the test says")
    write_json(
        logs / attempt.FILE,
        json.loads((logs / "outcome.json").read_text()) | {"attempt": 1, "checkpoint": 3, "asked": False},
    )


def test_options_are_checked_and_documented(place) -> None:
    options = place[0].Options
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen
    assert not RESERVED & {field.name for field in dataclasses.fields(options)}
    schema = pydantic.TypeAdapter(options).json_schema()
    assert "required" not in schema
    assert all("description" in facts for facts in schema.get("properties", {}).values())
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(options).validate_python({"no_such_option": 1})


def test_describe_tells_what_would_be_started_and_writes_nothing(place) -> None:
    backend, made, config, folder = place
    before = sorted(folder.rglob("*"))
    assert made.script in backend.describe(config, folder, backend.Options(**made.options))
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_is_submitted_runs_and_ends(place) -> None:
    backend, made, _, folder = place
    began = time.monotonic()
    handle = submitted(place)
    assert time.monotonic() - began < 10
    assert backend.state(folder, handle)[0] in ("pending", "running")
    made.begin(folder, handle)
    word, detail = backend.state(folder, handle)
    assert word == "running"
    assert detail
    logged(folder, Outcome.FINISHED)
    assert [path.name for path in backend.logs(folder, handle)][:2] == ["rank-0.log", "rank-1.log"]
    made.finish(folder, handle)
    assert backend.state(folder, handle)[0] == "ended"
    assert "not" in backend.cancel(folder, handle, False)


def test_a_run_that_vanishes_is_told(place) -> None:
    backend, made, _, folder = place
    handle = submitted(place)
    made.begin(folder, handle)
    made.vanish(folder, handle)
    word, detail = backend.state(folder, handle)
    assert word == "vanished"
    assert detail


@pytest.mark.parametrize("now", [False, True])
def test_cancel_asks_for_a_save_or_ends_at_once(place, now) -> None:
    backend, made, _, folder = place
    handle = submitted(place)
    made.begin(folder, handle)
    (folder / "logs/1").mkdir()
    sentence = backend.cancel(folder, handle, now)
    assert "r" in sentence.split()
    assert made.asked(folder, handle) == ("now" if now else "save")
    if not now:
        made.vanish(folder, handle)


def test_a_backend_waits_for_other_runs_or_says_that_it_cannot(place) -> None:
    backend, made, config, folder = place
    if made.waits:
        return
    with pytest.raises(RunError, match="cannot wait"):
        backend.submit(config, folder, backend.Options(**made.options), resume=False, after=["other"])


def test_many_states_at_once_are_those_one_by_one(place) -> None:
    backend, made, _, folder = place
    handle = submitted(place)
    made.begin(folder, handle)
    if hasattr(backend, "states"):
        assert list(backend.states([(folder, handle)])) == [backend.state(folder, handle)]
    _, told = handles.states([(folder, handles.read(folder))])[0]
    assert told[0] == "running"
    made.vanish(folder, handle)
