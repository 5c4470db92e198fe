"""Every sink for real: two attempts, the second resumed from an earlier step, read back from what the sink stored."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from trainer import config as configuration
from trainer.metrics.follow import follow
from trainer.metrics.history import History, cut, read
from trainer.registry import alternatives

BASE = {
    "name": "r",
    "model": {"config": {"model_type": "llama"}},
    "data": {"path": "stdlib", "sequence_length": 16},
    "train": {"length": "9 steps", "tokens_per_step": 32},
    "optim": {"name": "adamw"},
    "parallel": {"name": "single"},
}
SINKS = [{"name": "tensorboard"}, {"name": "wandb", "mode": "offline"}, {"name": "mlflow"}]
SECRETS = {"WANDB_API_KEY": "f" * 39 + "0", "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery"}


def settings(runs: Path, sinks: list[dict[str, str]]):
    return configuration.parse({**BASE, "runs": str(runs), "metrics": {"sinks": sinks}})


def attempt(folder: Path, sinks: list[dict[str, str]], resumed: int, last: int, shift: float) -> list[str]:
    """Steps after `resumed` up to `last`, as a loop writes them; a validation at step 4. What was told."""
    told: list[str] = []
    path = folder / "metrics.jsonl"
    cut(path, resumed)
    history = History(path, follow(settings(folder.parent, sinks), folder, resumed, read(path), told.append))
    for step in range(resumed + 1, last + 1):
        groups = {"groups": {"matrices": {"update_rms": step / 100, "tau_epochs": None}}} if step % 3 == 0 else {}
        history.write(step=step, loss=None if step == 2 else 10.0 - step + shift, seconds=0.1, **groups)
        if step == 4:
            history.write(step=step, validation_loss=7.0)
    history.close()
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sinks") / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": "r", "created": 1.0}))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SECRETS.items():
            patch.setenv(key, value)
        for key in [k for k in os.environ if k.startswith(("WANDB_MODE", "MLFLOW_TRACKING_URI"))]:
            patch.delenv(key)
        assert attempt(folder, SINKS, 0, 6, 0.0) == []
        assert attempt(folder, SINKS, 4, 9, 0.5) == []  # killed at 6, resumed from the save at 4
    return folder


FIRST = {step: 10.0 - step for step in range(1, 7) if step != 2}
SECOND = {step: 10.5 - step for step in range(5, 10)}


def test_every_sink_of_the_registry_is_tested() -> None:
    assert {sink["name"] for sink in SINKS} == set(alternatives("trainer.metrics.sinks"))


def test_tensorboard_shows_the_history_and_not_what_was_cut(folder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "sinks" / "tensorboard")).Reload()
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("loss")} == {
        r["step"]: r["loss"] for r in read(folder / "metrics.jsonl") if r.get("loss") is not None
    }
    assert len(events.Scalars("loss")) == 8
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(4, 7.0)]
    assert [e.step for e in events.Scalars("groups/matrices/update_rms")] == [3, 6, 9]
    assert "step" not in events.Tags()["scalars"]


def wandb_records(path: Path):
    """The records of a `.wandb` file: a LevelDB log with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb_offline_is_one_run_and_each_step_once(folder) -> None:
    files = sorted((folder / "sinks" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    ids, losses = set(), {}
    for path in files:
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("orthogon", "r")
            if record.WhichOneof("record_type") == "history":
                items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if "loss" in items:
                    assert items["_step"] not in losses
                    losses[items["_step"]] = items["loss"]
    assert len(ids) == 1
    assert losses == {**SECOND, **FIRST}  # W&B takes nothing back: steps 5 and 6 stay those of the first attempt


def test_mlflow_is_one_run_and_each_step_once(folder) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("orthogon")
    (run,) = client.search_runs([experiment.experiment_id])
    points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert len(points) == 8
    assert dict(points) == {**SECOND, **FIRST}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "groups/matrices/update_rms")] == [3, 6, 9]
    assert run.data.params["train.length"] == "9 steps"
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")


def test_no_secret_is_in_any_file(folder) -> None:
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_a_sink_added_later_gets_the_history_from_its_start(folder, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    late = tmp_path / "r"
    late.mkdir()
    for name in ("metrics.jsonl", "run.json"):
        (late / name).write_bytes((folder / name).read_bytes())
    assert attempt(late, [{"name": "tensorboard"}], 9, 10, 0.0) == []
    events = EventAccumulator(str(late / "sinks" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
