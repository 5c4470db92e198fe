"""Weights & Biases, online or offline. The API key comes from WANDB_API_KEY or `wandb login`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.registry import STRICT, lazy

wandb: Any = lazy("wandb")

PACKAGES = ("wandb",)
REWINDS = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """Weights & Biases. Sent are the history and the configuration; not code, git, command line or console."""

    __pydantic_config__ = STRICT
    name: Literal["wandb"] = "wandb"
    project: str = "orthogon"
    """The project."""
    entity: str | None = None
    """User or team; none takes W&B's own default."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes to `RUN/sinks/wandb` for `wandb sync`; none takes WANDB_MODE, else online."""


class Sink:
    """One W&B run per run: its id follows from the run folder, so that every attempt continues it."""

    def __init__(self, options: Options, target: Any) -> None:
        self.id = target.run
        target.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
            x_disable_meta=True, silent=True, finish_timeout=target.patience,
        )  # fmt: skip
        self.run = wandb.init(
            project=options.project, entity=options.entity, mode=options.mode, id=self.id, name=target.name,
            config=target.config, dir=str(target.folder), resume="allow", settings=settings,
        )  # fmt: skip

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def flush(self) -> None:
        """Nothing to do: W&B's own process has taken every value."""

    def close(self) -> None:
        self.run.finish()
