"""TensorBoard: event files in the run folder; `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from trainer.registry import STRICT, lazy

tensorboard: Any = lazy("torch.utils.tensorboard")

PACKAGES = ("tensorboard",)
REWINDS = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """TensorBoard event files in `RUN/sinks/tensorboard`."""

    __pydantic_config__ = STRICT
    name: Literal["tensorboard"] = "tensorboard"


class Sink:
    """An event file. Points from step `rewind` on that earlier attempts wrote are marked as orphans, which TensorBoard hides."""

    def __init__(self, options: Options, target: Any) -> None:
        self.writer = tensorboard.SummaryWriter(str(target.folder / "tensorboard"), purge_step=target.rewind)
        if target.id is None:
            self.writer.add_text("config", f"```\n{json.dumps(target.config, indent=1)}\n```")
        self.id = target.run

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Hand over what was written: the next attempt will not send it again."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
