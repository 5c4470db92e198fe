"""How long a run takes, how often it should save, how often it is requeued: formulas and their stated assumptions."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evidence
from trainer import runfolder
from trainer.checkpoint import manifest as manifests
from trainer.metrics import history
from trainer.model.peaks import GPUS, peak_of
from trainer.units import split_interval

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.derive import Derived

FAILURE_HOURS = 50_000.0
"""GPU-hours between failures: 419 unexpected interruptions in 54 days on 16,384 GPUs make 50,676 (Llama 3, arXiv
2407.21783, section 3.3.4)."""
WRITE_BYTES = 1e9
"""Bytes per second that a node is assumed to write, hash and read back, where no save was measured."""
START_SECONDS = 120.0
"""What an attempt is assumed to need before its first step."""


@dataclass(frozen=True)
class Measured:
    """What the run folder of this name knows already."""

    tokens_per_second_and_rank: float | None
    save_seconds: float | None


def measured(folder: Path) -> Measured:
    """Median speed of the last steps by rank, and seconds of the last save; None where there is no such run."""
    if not (folder / "config.yaml").exists():
        return Measured(None, None)
    saves = [event for event in runfolder.events(folder) if event["event"] == "saved"]
    speed, newest = None, evidence.newest_checkpoint(folder)
    if newest is not None and (folder / "metrics.jsonl").exists():
        records = [r["tokens_per_second"] for r in history.read(folder / "metrics.jsonl") if "tokens_per_second" in r]
        try:
            ranks = manifests.read(folder / "checkpoints" / manifests.name(newest)).world_size
        except manifests.Damaged:
            ranks = 0
        if records and ranks:
            speed = statistics.median(records[-50:]) / ranks
    return Measured(speed, saves[-1]["seconds"] if saves else None)


def step_seconds(
    config: RunConfig,
    record: dict[str, Any],
    derived: Derived,
    world: int,
    gpu: str,
    mfu: float,
    owners: dict[str, float],
    known: Measured,
) -> tuple[float | None, list[str]]:
    """Seconds of a step, and what was assumed.

    On a GPU: the model's operations at the assumed share of the peak (exchange and waiting are in that share), times the
    idle rows of an uneven split, plus the products of the matrix rule's busiest rank at the same share of the bf16 peak.
    On a CPU: what the run of this name reached, per rank.
    """
    tokens = derived.sequences_per_step * config.data.sequence_length
    if gpu == "cpu":
        if known.tokens_per_second_and_rank is None:
            return None, [f"the peak of a CPU is not known, and {config.folder} has no steps to measure"]
        speed = known.tokens_per_second_and_rank
        return tokens / (speed * world), [f"{speed:,.0f} tokens/s per rank, measured in {config.folder}"]
    precision = config.train.precision
    peak, half = peak_of(GPUS[gpu][0], precision), peak_of(GPUS[gpu][0], "bf16")
    if record["flops_per_token"] is None or peak is None or half is None:
        return None, ["the operations of this architecture are not known by formula"]
    uneven = derived.micro_steps * derived.rows * world / derived.sequences_per_step
    model = record["flops_per_token"] * tokens * uneven / (world * peak * mfu)
    update = owners.get("work", 0.0) * record["polar_steps"] / (half * mfu)
    assumed = [
        f"{mfu:.0%} of the peak of {peak / 1e12:g} TFLOP/s ({GPUS[gpu][0]}, {precision}), exchange included",
        f"{record['flops_per_token']:,} operations per token",
    ]
    if uneven > 1:
        assumed.append(f"{uneven - 1:.1%} of the rows are empty: the sequences do not divide by the ranks")
    if update:
        assumed.append(f"the update's products take {update / (model + update):.1%} of a step, on its busiest rank")
    return model + update, assumed


def save_interval(save: float, failure: float) -> float:
    """Seconds between saves that lose least: Daly's higher-order estimate (doi 10.1016/j.future.2004.11.016, eq. 37).

    Args:
        save: seconds of a save.
        failure: mean seconds between failures of the whole job.
    """
    if save >= 2 * failure:
        return failure
    ratio = save / (2 * failure)
    return math.sqrt(2 * save * failure) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def lost_share(save: float, interval: float, failure: float) -> float:
    """Share of the time that goes into saves, and into what is trained again after a failure; to first order."""
    return save / (interval + save) + (interval + save) / (2 * failure)


def interval_seconds(config: RunConfig, step: float | None) -> float | None:
    """`checkpoint.every` in seconds."""
    number, unit = split_interval(config.checkpoint.every)
    if unit == "seconds":
        return number
    return None if step is None else number * step


def requeues(seconds: float, limit: float, save: float, stop: float) -> int | None:
    """How often a run of so many seconds of steps starts anew under a time limit; None if it never gets to train.

    Each attempt pays for its start, for its last save, and for the notice before the limit (`stop`).
    """
    useful = limit - START_SECONDS - save - stop
    return None if useful <= 0 else math.ceil(seconds / useful) - 1
