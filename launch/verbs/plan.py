"""The verb plan."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch.verbs.options import Json
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell what a run would take: memory, wire, hours, disk, saves, requeues. Starts nothing.

    `--section.key=value` overrides the file. The first plan of a model takes some seconds, later ones a fraction of one. What
    cannot run is refused, with what would help.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""
    nodes: int = 1
    """Nodes."""
    gpus_per_node: int | None = None
    """Ranks on each node; none takes resources.ranks, else 8, or 1 without a GPU."""
    gpu: str | None = None
    """Which GPU: b200, h200, h100, h100-nvl, h100-pcie, a100, a100-40gb, l40s, l4, rtx-4090, mi300x, or cpu; none takes
    cpu where resources.device is cpu, else h100."""
    time_limit: str | None = None
    """Wall time of one attempt, e.g. 24h; none takes train.time_limit."""
    mfu: float = 0.4
    """Share of the peak that the model's operations are assumed to reach."""
    save_seconds: float | None = None
    """Seconds of a save; none takes those of this run's last save, if there was one."""
    failure_hours: float = 50_000.0
    """GPU-hours between failures."""
    json: Json = False

    def __call__(self, overrides: list[str]) -> int:
        from launch.plan import Machine, plan
        from launch.shapes import shapes
        from trainer import config as configuration
        from trainer.units import parse_seconds

        config = configuration.load(self.config, overrides)
        gpu = self.gpu or ("cpu" if config.resources.device == "cpu" else "h100")
        per_node = self.gpus_per_node
        if per_node is None:
            per_node = config.resources.ranks or (1 if gpu == "cpu" else 8)
        try:
            limit = parse_seconds(self.time_limit)
        except ValueError as error:
            raise RunError(f"--time-limit: {error}", where="command line, --time-limit", mend="e.g. 24h") from None
        machine = Machine(
            nodes=self.nodes, per_node=per_node, gpu=gpu, time_limit=limit, mfu=self.mfu,
            save_seconds=self.save_seconds, failure_hours=self.failure_hours,
        )  # fmt: skip
        found = plan(config, machine, shapes)
        print(json_format.dumps(found) if self.json else "\n".join(lines(found)))
        return 0


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A plan for people."""
    from launch.plan import gigabytes

    model, machine, step = found["model"], found["machine"], found["step"]
    labels = ", ".join(f"{label} {count:,}" for label, count in model["by label"].items())
    yield f"plan of {found['name']} on {machine['nodes']} x {machine['ranks per node']} {machine['gpu']}, {found['parallel']}"
    yield f"model      {model['type']}, {model['parameters']:,} parameters ({labels})"
    yield (
        f"step       {step['sequences']} sequences = {machine['ranks']} ranks x {step['micro steps']} micro-steps x "
        f"{step['rows']} rows; {step['tokens']:,} tokens"
    )
    memory = found["memory"]
    yield "\nmemory of the fullest rank"
    for category, size in memory["bytes"].items():
        if size and category != "total":
            yield f"  {category:40}{gigabytes(size):>12}"
    room = "" if memory["room"] is None else f"   of {gigabytes(memory['room'])} for tensors"
    yield f"  {'total (backward or update, the larger)':40}{gigabytes(memory['bytes']['total']):>12}{room}"
    if memory["unknown"]:
        yield f"  activations are not known and not in the total: {memory['unknown']}"
    yield "\nsent by each rank in a step"
    for kind, size in found["wire"]["bytes sent"].items():
        yield f"  {kind:40}{gigabytes(size):>12}"
    owners = found["wire"]["owners"]
    if owners:
        yield (
            f"  {owners['matrices']} matrices have owners; the busiest rank has {owners['imbalance']:.2f} of the mean work "
            f"and sends {gigabytes(owners['most'])}"
        )
    yield from time_lines(found["time"], found["requeues"])
    yield from disk_lines(found["disk"], found["saves"])


def time_lines(time: dict[str, Any], requeues: int | None) -> Iterator[str]:
    yield "\ntime"
    if time["seconds per step"] is not None:
        share = "" if time["mfu"] is None else f", MFU {time['mfu']:.1%}"
        yield f"  {time['tokens per second']:,.0f} tokens/s, {time['seconds per step']:.3f} s per step{share}"
    if time["steps"] is not None:
        yield f"  {time['steps']:,} steps, {time['tokens']:,} tokens"
    if time["hours"] is not None:
        yield f"  {time['hours']:.2f} hours, {time['gpu hours']:,.1f} rank-hours"
    elif time["hours per billion tokens"] is not None:
        yield f"  {time['hours per billion tokens']:.2f} hours per billion tokens"
    for text in time["assumed"]:
        yield f"  assumed: {text}"
    if requeues is not None:
        yield f"  a limit of {time['time limit'] / 3600:g} h means {requeues} requeues"


def disk_lines(disk: dict[str, Any], saves: dict[str, Any]) -> Iterator[str]:
    from launch.plan import gigabytes

    yield "\ndisk and saves"
    verdict = "" if disk["total"] <= disk["free"] else "   TOO LITTLE: saves would fail there"
    yield (
        f"  a checkpoint takes {gigabytes(disk['checkpoint'])}; {disk['kept']} kept, one being written, and the export "
        f"{gigabytes(disk['total'])}; free in {disk['where']}: {gigabytes(disk['free'])}{verdict}"
    )
    yield f"  a save takes {saves['seconds']:.1f} s ({saves['how']})"
    lost = "" if saves["lost"] is None else f", which loses {saves['lost']:.2%}"
    yield (
        f"  a failure every {saves['hours between failures']:,.1f} h ({saves['failure hours']:,.0f} GPU-hours each): save "
        f"every {saves['best interval'] / 60:.0f} min (Young-Daly), which loses {saves['lost at best']:.2%}; "
        f"checkpoint.every is {saves['every']}{lost}"
    )
