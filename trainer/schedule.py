"""Learning-rate schedules: pure functions of the step, as factors of each group's own rate."""

from __future__ import annotations

import math

from trainer.config import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of a run of `steps` (0 <= step < steps).

    Warm-up reaches 1 at its last step. A fall of k steps passes (1/(k+1), ..., k/(k+1)): its first step is already
    below 1 and its last still above the floor, so that no step is wasted on a rate of zero.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    stable = schedule.name in ("wsd", "1-sqrt")
    fall = round(schedule.decay * steps) if stable else steps - warmup
    fall = min(fall, steps - warmup)
    into = step - (steps - fall) + 1
    if into <= 0:
        return 1.0
    progress = into / (fall + 1)
    if schedule.name == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.name == "1-sqrt":
        shape = 1 - math.sqrt(progress)  # Haegele et al., arXiv 2405.18392
    else:
        shape = 1 - progress
    return schedule.floor + (1 - schedule.floor) * shape
