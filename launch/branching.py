"""What a branch of a run trains: how far, at what rate."""

from __future__ import annotations

import math

from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.outcome import RunError
from trainer.schedule import factor
from trainer.units import split_length


def steps_of(length: str, config: RunConfig) -> int | None:
    """The optimizer steps of a length; None for epochs, whose number only the data tells."""
    number, unit = split_length(length)
    per_step = config.train.tokens_per_step // config.data.sequence_length
    if unit == "steps":
        return int(number)
    return math.ceil(math.ceil(number / config.data.sequence_length) / per_step) if unit == "tokens" else None


def cooldown(length: str, manifest: manifests.Manifest, config: RunConfig, overrides: list[str]) -> list[str]:
    """The overrides that let the rate fall over `length` from the checkpoint on.

    Raises:
        RunError: it is no length in steps or tokens, or an override says something else.
    """
    for key in ("train.length", "schedule.decay", "schedule.name"):
        if any(given.startswith(f"--{key}=") for given in overrides):
            raise RunError(f"--cooldown sets {key}", where=f"command line, --{key}", mend="leave one of the two out")
    example = 'e.g. --cooldown "100 steps" or "1B tokens"'
    try:
        steps = steps_of(length, config)
    except ValueError as error:
        raise RunError(str(error), where="command line, --cooldown", mend=example) from None
    if steps is None:
        raise RunError(f"--cooldown is '{length}', in epochs", where="command line, --cooldown", mend=example)
    total = manifest.step + steps
    found = [f"--train.length={total} steps", f"--schedule.decay={steps / total!r}"]
    return found if config.schedule.name in ("wsd", "1-sqrt") else [*found, "--schedule.name=wsd"]


def check_length(manifest: manifests.Manifest, config: RunConfig) -> None:
    """The new run's end lies beyond the checkpoint.

    Raises:
        RunError: nothing would be left to train.
    """
    steps = steps_of(config.train.length, config)
    if steps is not None and steps <= manifest.step:
        raise RunError(
            f"the checkpoint is of step {manifest.step}: train.length = {config.train.length} leaves nothing to train",
            where="train.length",
            mend=f'give more, e.g. --train.length="{manifest.step + max(1, manifest.step // 10)} steps", '
            "or an earlier step with --from-step",
        )


def rate_at(config: RunConfig, step: int) -> str:
    """The factor of the learning rate at the step after `step`, as words."""
    steps = steps_of(config.train.length, config)
    if steps is None:
        return "known when the data is open"
    return "past its end" if step >= steps else f"{factor(config.schedule, step, steps):.4f} of the full rate"
