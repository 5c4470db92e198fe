"""What follows from the configuration, the data and the number of ranks: printed in one table at the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from trainer.config import RunConfig
from trainer.outcome import RunError
from trainer.units import split_interval, split_length


class Epochs(Protocol):
    """What a stream of data knows about passes over its sources."""

    def after_epochs(self, number: float, name: str | None = None) -> int: ...

    def first_exhausted(self, max_epochs: int) -> tuple[int, str]: ...


@dataclass(frozen=True)
class Derived:
    """The quantities that nobody sets."""

    sequences_per_step: int
    """Sequences of one optimizer step over all ranks."""
    micro_steps: int
    """Forward and backward passes of each rank per optimizer step."""
    rows: int
    """Sequences of one micro-step on one rank, at most `train.micro_batch_size`; under `auto` what was found to fit."""
    sequences: int
    """Sequences of the whole run; the position in the data runs from 0 to this."""
    steps: int
    """Optimizer steps of the whole run; the last may be shorter."""
    available: int
    """Sequences that `data.max_epochs` allows; the run ends with `out of data` there."""


def derive(config: RunConfig, world: int, data: Epochs, rows: int | None = None) -> Derived:
    """Work out steps and micro-steps.

    Args:
        rows: most sequences of a micro-step under `train.micro_batch_size: auto`; None is a rank's whole share of a step.

    Raises:
        RunError: more ranks than sequences in a step.
    """
    train, length = config.train, config.data.sequence_length
    per_step = train.tokens_per_step // length
    if world > per_step:
        raise RunError(
            f"{world} ranks share a step of {per_step} sequences",
            where="train.tokens_per_step, resources.ranks",
            mend=f"use at most {per_step} ranks, or at least {world * length} tokens per step",
        )
    number, unit = split_length(train.length)
    if unit == "steps":
        sequences = int(number) * per_step
    elif unit == "tokens":
        sequences = math.ceil(number / length)
    else:
        sequences = data.after_epochs(number, unit.removeprefix("epochs").removeprefix(" of ") or None)
    if sequences < 1:
        raise RunError(
            f"train.length = {train.length} is less than one sequence", where="train.length", mend="raise it"
        )
    share = math.ceil(per_step / world)
    most = (rows or share) if train.micro_batch_size == "auto" else train.micro_batch_size
    micro_steps = math.ceil(per_step / (world * most))
    limit = config.data.max_epochs
    return Derived(
        sequences_per_step=per_step,
        micro_steps=micro_steps,
        rows=math.ceil(per_step / (world * micro_steps)),
        sequences=sequences,
        steps=math.ceil(sequences / per_step),
        available=sequences if limit is None else min(sequences, data.first_exhausted(limit)[0]),
    )


def evaluation_interval(config: RunConfig) -> int:
    """Steps between validations."""
    return int(split_interval(config.evaluate.every)[0])
