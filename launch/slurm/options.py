"""What a cluster is asked for: the options of the backend, and how long a time limit is. Loads no pydantic: whoever checks has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from trainer.registry import STRICT


@dataclass(frozen=True)
class Matching:
    """A string that a regular expression finds; with `numbers`, a whole number counts as its digits."""

    pattern: str
    numbers: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        text = core_schema.str_schema(pattern=self.pattern, strict=True)
        if not self.numbers:
            return text
        return core_schema.no_info_before_validator_function(
            lambda value: str(value) if type(value) is int else value, text
        )


Word = Annotated[str, Matching(r"^[^\s'\"\\`$;&|<>]+$")]
"""One word of a command line, without anything that a shell reads."""
Line = Annotated[str, Matching(r"^[^\r\n]*$")]
Positive = Annotated[int, Gt(0)]
Time = Annotated[str, Matching(r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d\d?(:\d\d){0,2})$", numbers=True)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of which machines, and how ranks start on them."""

    __pydantic_config__ = STRICT
    nodes: Positive = 1
    """Machines."""
    ranks_per_node: Positive | None = None
    """Processes on each, one per GPU; none takes `resources.ranks` of the run, else one."""
    cpus_per_rank: Positive | None = None
    """CPUs of each process; none takes `resources.threads_per_rank` of the run."""
    gres: Word | None = None
    """Devices of a node, e.g. `gpu:h100:8`; none asks for one GPU per rank, and for nothing where `resources.device` is cpu."""
    mem: Word | None = None
    """Memory of a node, e.g. `64G`; `0` is all of it."""
    time: Time | None = None
    """Time limit of one job, as Slurm writes it: `30` (minutes), `12:00:00`, `2-00`. The run is longer: it is requeued."""
    partition: Word | None = None
    """The queue; none takes the cluster's default."""
    account: Word | None = None
    """Whose budget pays; none takes the user's default."""
    qos: Word | None = None
    """Quality of service; none takes the account's default."""
    constraint: Line | None = None
    """Features of nodes, e.g. `ib&h100`."""
    exclude: tuple[Word, ...] = ()
    """Nodes that are never used, beside those that failed in the last day."""
    exclusive: bool = False
    """Whole nodes."""
    start: Literal["srun", "torchrun"] = "srun"
    """`srun` starts every rank itself; `torchrun` has one torchrun per node, started by srun, start them."""
    container: Word | None = None
    """Image that ranks run in: a path or URI. The batch script itself runs outside of it."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the image: srun's plugin of Enroot, or `apptainer exec --nv`."""
    container_python: Word = "python3"
    """The Python of the image, with this program's dependencies."""
    mounts: tuple[Word, ...] = ()
    """More folders that the image sees, as `FROM:TO`; the program's and the run's are mounted anyway."""
    sbatch: tuple[Line, ...] = ()
    """Further options of sbatch, each a line, e.g. `--reservation=night`."""
    srun: tuple[Line, ...] = ()
    """Further options of srun, e.g. `--cpu-bind=none`."""
    setup: tuple[Line, ...] = ()
    """Shell lines before the ranks start, e.g. `module load cuda`, `export NCCL_SOCKET_IFNAME=ib0`."""
    environment: tuple[Word, ...] = ()
    """Names of further variables that the job gets from the submitter's environment."""
    array_limit: Positive | None = None
    """Most members of an ensemble that run at a time; none says all."""


def minutes(time: str) -> float:
    """A time limit of Slurm in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in re.split(":", rest)]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)
