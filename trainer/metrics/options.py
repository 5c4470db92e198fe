"""What is recorded besides the history, how often, and where it is shown. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Field

from trainer import registry
from trainer.registry import STRICT
from trainer.units import Interval

if TYPE_CHECKING:
    SinkOptions = Any
else:
    _options = tuple(module.Options for module in registry.alternatives("trainer.metrics.sinks").values())
    SinkOptions = Annotated[Union[_options], Discriminator("name")]

Step = Annotated[int, Field(gt=0)]
Window = tuple[Step, Step]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is recorded and where it is shown; `metrics.jsonl` is always written and is the truth."""

    __pydantic_config__ = STRICT
    groups_every: Interval | None = "50 steps"
    """Interval, in steps, between records of each parameter group's gradient norm, update, weights and decay time; none:
    never. At these steps a copy of this rank's weights is held while the optimizer works."""
    sinks: list[SinkOptions] = field(default_factory=list)
    """Other places that show the history, each at most once; secrets come from the environment, never from here."""
    profile: Window | None = None
    """`[first, number]`: so many steps from that one on (counted from 1) are traced by torch's profiler on every rank."""
    memory_snapshot: Window | None = None
    """`[first, number]`: so many steps whose CUDA allocations are recorded on every rank."""
