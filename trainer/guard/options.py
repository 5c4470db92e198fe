"""What a run does about steps that go wrong, and how long it waits before it believes that it hangs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from trainer.registry import STRICT
from trainer.units import Seconds


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps that go wrong, and patience."""

    __pydantic_config__ = STRICT
    spike_threshold: Annotated[float, Field(gt=0)] | None = 10.0
    """Robust z-score (distance from the median over 1.4826 median absolute deviations, of the logarithms) of the loss or
    of the gradient norm above which a step is skipped as a spike; none never does."""
    spike_window: Annotated[int, Field(ge=16)] = 128
    """Applied steps that the z-score looks back on; it begins to judge when half of them are there."""
    max_skips: Annotated[int, Field(ge=1)] = 3
    """Steps in a row that are skipped (not finite, or a spike) before the run goes back to its last good checkpoint and
    leaves out the data since."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """Times in a row that the run goes back before it ends as diverged; a good checkpoint after one counts anew."""
    hang_timeout: Seconds = 600.0
    """Time without progress of any rank after which all end as infrastructure, with the stacks of all ranks in their logs."""
    first_step_timeout: Seconds = 3600.0
    """The same for a run's start and first step, which may compile."""
    stop_timeout: Seconds = 300.0
    """Time from a signal to a saved checkpoint that a run promises: a rank that reaches no step border by then ends."""
