"""The `distill` section of a configuration: from whom a run learns beside its text. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from trainer.outcome import RunError
from trainer.registry import STRICT


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher's distributions as targets: the loss is (1 - alpha) CE + alpha T^2 KL(teacher || student)."""

    __pydantic_config__ = STRICT
    teacher: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """An ensemble, or else a run, under `runs`. A run keeps to the members that it began with."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the teacher; 0 is the plain run, which does not ask it."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T: both distributions are softmax(z / T). A cache of top-k or sampled targets holds those of T = 1."""
    cache: str | None = None
    """Folder of targets that `orthogon distill cache` made for this data; none asks the members in every step."""


def check(distill: DistillConfig | None, parallel: Any, train: Any) -> None:
    """Refuse what the loss against a teacher cannot do.

    Raises:
        RunError: names the key.
    """
    if distill is None or distill.alpha == 0:
        return
    if train.micro_batch_size == "auto":
        raise RunError(
            "train.micro_batch_size: auto tries the model alone, and distill needs room for the teacher beside it",
            where="train.micro_batch_size",
            mend="give a number of sequences",
        )
    if parallel.name == "deepspeed" and parallel.stage == 3:
        raise RunError(
            "distill needs the head's weights for all chunks, and parallel.stage: 3 gathers them for one call only",
            where="distill",
            mend="use parallel.stage: 2 or fsdp2",
        )
