"""What a branch of a run trains: how far, at what rate."""

from __future__ import annotations

import math

from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.config_data import weights_of
from trainer.data.mixture import Passes
from trainer.derive import derive
from trainer.outcome import RunError
from trainer.schedule import factor
from trainer.units import split_length


def cooldown(length: str, manifest: manifests.Manifest, config: RunConfig, overrides: list[str]) -> list[str]:
    """The overrides that let the rate fall over `length` from the checkpoint on.

    Raises:
        RunError: it is no length, or an override says something else.
    """
    for key in ("train.length", "schedule.decay", "schedule.name"):
        if any(given.startswith(f"--{key}=") for given in overrides):
            raise RunError(f"--cooldown sets {key}", where=f"command line, --{key}", mend="leave one of the two out")
    try:
        number, unit = split_length(length)
    except ValueError as error:
        raise RunError(str(error), where="command line, --cooldown", mend='e.g. --cooldown="100 steps"') from None
    per_step = config.train.tokens_per_step // config.data.sequence_length
    if unit == "steps":
        sequences = number * per_step
    elif unit == "tokens":
        sequences = number / config.data.sequence_length
    else:
        sequences = passes(manifest, config).after_epochs(
            number, unit.removeprefix("epochs").removeprefix(" of ") or None
        )
    steps = max(1, math.ceil(sequences / per_step))
    total = manifest.step + steps
    found = [f"--train.length={total} steps", f"--schedule.decay={steps / total!r}"]
    return found if config.schedule.name in ("wsd", "1-sqrt") else [*found, "--schedule.name=wsd"]


def passes(manifest: manifests.Manifest, config: RunConfig) -> Passes:
    """The passes over the data that the checkpoint's run reads."""
    sources = manifest.state["data"]["sources"]
    return Passes(weights_of(config.data), {name: s.get("subset", s["sequences"]) for name, s in sources.items()})


def check_length(manifest: manifests.Manifest, config: RunConfig) -> int:
    """The steps of the new run, which must lie beyond the checkpoint.

    Raises:
        RunError: nothing would be left to train.
    """
    derived = derive(config, 1, passes(manifest, config))
    if derived.available <= manifest.position:
        raise RunError(
            f"the checkpoint of step {manifest.step} is at the end: train.length = {config.train.length} leaves nothing to train",
            where="train.length",
            mend=f'give more, e.g. --train.length="{manifest.step + max(1, manifest.step // 10)} steps", '
            "or an earlier step with --from-step",
        )
    return derived.steps


def show_rate(config: RunConfig, manifest: manifests.Manifest) -> None:
    """The factor of the learning rate at the next step, under one run's schedule."""
    steps = derive(config, 1, passes(manifest, config)).steps
    if manifest.step < steps:
        rate = factor(config.schedule, manifest.step, steps)
        print(f"learning rate at step {manifest.step + 1}: {rate:.4f} of the full rate in {config.name}")
