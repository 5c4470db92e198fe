"""MLflow: a tracking server, or files on this machine.

Credentials come from MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Literal

from trainer.registry import STRICT, lazy

entities: Any = lazy("mlflow.entities")
tracking: Any = lazy("mlflow.tracking")

PACKAGES = ("mlflow-skinny", "mlflow")
REWINDS = False
LONGEST = 500  # characters of a parameter that every server takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """MLflow. Sent are the history, and the configuration as parameters."""

    __pydantic_config__ = STRICT
    name: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """Tracking URI; none takes MLFLOW_TRACKING_URI, else files in the folder `mlruns` beside the run folders."""
    experiment: str = "orthogon"
    """The experiment."""


class Sink:
    """One MLflow run per run; the id that the server gave it is kept, so that every attempt continues it."""

    def __init__(self, options: Options, target: Any) -> None:
        files = (target.folder.parent.parent / "mlruns").resolve().as_uri()
        uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or files
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # refused otherwise: it gets no new features
        self.client = tracking.MlflowClient(tracking_uri=uri)
        self.id: str = target.id or self._create(options, target)
        self.client.update_run(self.id, status="RUNNING")

    def _create(self, options: Options, target: Any) -> str:
        found = self.client.get_experiment_by_name(options.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(options.experiment)
        run = self.client.create_run(experiment, run_name=target.name, tags={"orthogon.run": target.run})
        parameters = [entities.Param(key, str(value)[:LONGEST]) for key, value in target.flat_config.items()]
        for start in range(0, len(parameters), 100):  # most that one request takes
            self.client.log_batch(run.info.run_id, params=parameters[start : start + 100])
        return str(run.info.run_id)

    def write(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [entities.Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def flush(self) -> None:
        """Nothing to do: every batch was written or sent."""

    def close(self) -> None:
        self.client.set_terminated(self.id, "FINISHED")
