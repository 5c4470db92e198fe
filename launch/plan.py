"""What a run would take, before it is submitted: memory, wire, hours, disk, saves, requeues; and whether it can run.

Everything comes from the configuration and the footprint of the model (`launch/shapes.py`); nothing is started. What is
assumed is told beside the figure that rests on it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launch import plan_time
from launch.plan_memory import BUCKET, checkpoint_bytes, memory
from launch.plan_wire import low_rank, owners, wire
from trainer import registry
from trainer.derive import Derived, derive
from trainer.model.peaks import GPUS, peak_of
from trainer.outcome import RunError
from trainer.yaml_source import nearest

if TYPE_CHECKING:
    from trainer.config import RunConfig

USABLE = 0.92
"""Share of a GPU's memory that tensors can have: the rest is the driver's context, libraries and fragments."""
CHUNK = 2048
"""`train.loss_chunk` that is tried where memory is short."""
MOST_RANKS = 4096
NOTICE = 60.0
"""Seconds before a time limit at which a run is told to save."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run would go."""

    nodes: int = 1
    per_node: int = 1
    gpu: str = "cpu"
    time_limit: float | None = None
    mfu: float = 0.4
    save_seconds: float | None = None
    failure_hours: float = plan_time.FAILURE_HOURS

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def memory(self) -> int | None:
        """Bytes that tensors can have on one GPU; None where it is not known."""
        return None if self.gpu == "cpu" else int(USABLE * GPUS[self.gpu][1])

    def check(self) -> None:
        """Refuse what is no machine.

        Raises:
            RunError: an unknown GPU, no ranks or too many, a share that is none.
        """
        if self.gpu != "cpu" and self.gpu not in GPUS:
            guess = nearest(self.gpu, ["cpu", *GPUS])
            mend = f"did you mean {guess}?" if guess else f"one of: cpu, {', '.join(GPUS)}"
            raise RunError(f"there is no GPU '{self.gpu}' in the table", where="command line, --gpu", mend=mend)
        if min(self.nodes, self.per_node) < 1 or self.world > MOST_RANKS:
            raise RunError(
                f"{self.nodes} nodes of {self.per_node} ranks make {self.world} ranks",
                where="command line",
                mend=f"plan 1 to {MOST_RANKS} ranks",
            )
        if not 0 < self.mfu <= 1:
            raise RunError(f"--mfu={self.mfu:g} is no share of a peak", where="command line, --mfu", mend="e.g. 0.4")
        for name, value in (("save-seconds", self.save_seconds), ("failure-hours", self.failure_hours)):
            if value is not None and value <= 0:
                raise RunError(
                    f"--{name}={value:g} is not above zero", where=f"command line, --{name}", mend="raise it"
                )


class _Unprepared:
    """Data that is not prepared: how long its epochs are is not known."""

    asked = False

    def after_epochs(self, number: float, name: str | None = None) -> int:
        self.asked = True
        return 2**62

    def first_exhausted(self, max_epochs: int) -> tuple[int, str]:
        return 2**62, ""


def plan(config: RunConfig, machine: Machine, shapes: Callable[[RunConfig], dict[str, Any]]) -> dict[str, Any]:
    """The whole plan, as JSON values; bytes are integers, seconds and shares floats, None is what is not known.

    Args:
        shapes: gives the footprint of a configuration's model; called again only to look for what would fit.

    Raises:
        RunError: the run cannot be: ranks that do not fit the strategy or the step, or too little memory.
    """
    machine.check()
    world, data = machine.world, _Unprepared()
    registry.alternatives("trainer.parallel")[config.parallel.name].Strategy(
        config.parallel, config.train.precision, None, world
    )
    derived = derive(config, world, data)
    record = shapes(config)
    width = exchange_width(config, machine.gpu)
    derived, held = fitting(config, record, derived, machine, width)
    room = machine.memory
    if room is not None and held["total"] > room:
        raise short(config, machine, shapes, held["total"], room)
    matrices = owners(config, record["parameters"], world, width)
    travels: dict[str, float] = wire(config, record["parameters"], world, derived.micro_steps)
    if matrices:
        travels["optimizer exchange"] = matrices["mean"]
    elif sent := low_rank(config, record["parameters"], world):
        travels["optimizer exchange"] = sent
    known = plan_time.measured(config.folder)
    seconds, assumed = plan_time.step_seconds(config, record, derived, world, machine.gpu, machine.mfu, matrices, known)
    counts: dict[str, int] = {}
    for p in record["parameters"]:
        counts[p["label"]] = counts.get(p["label"], 0) + math.prod(p["shape"])
    return {
        "name": config.name,
        "model": {
            "type": record["model_type"], "parameters": sum(counts.values()), "by label": counts,
            "vocabulary": record["vocabulary"], "flops_per_token": record["flops_per_token"],
        },
        "machine": {"nodes": machine.nodes, "ranks per node": machine.per_node, "ranks": world, "gpu": machine.gpu},
        "parallel": config.parallel.name,
        "step": {
            "sequences": derived.sequences_per_step, "micro steps": derived.micro_steps, "rows": derived.rows,
            "tokens": derived.sequences_per_step * config.data.sequence_length,
        },
        "memory": {
            "bytes": held, "room": room, "optimizer bucket": BUCKET if matrices else 0,
            "unknown": record["why"] if record["activations"] is None else "",
        },
        "wire": {"bytes sent": {kind: round(value) for kind, value in travels.items()}, "owners": matrices},
        "time": times(config, machine, None if data.asked else derived.steps, derived, seconds, record["flops_per_token"], assumed),
        **saving(config, machine, record, None if data.asked else derived.steps, seconds, known),
    }  # fmt: skip


def exchange_width(config: RunConfig, gpu: str) -> int:
    """Bytes of an entry on its way to its owner: bf16, but for products in fp32 or fp64; `auto` on a CPU is taken for
    fp32, which it is without bf16 matrix units."""
    chosen = getattr(config.optim, "polar_dtype", "auto")
    if chosen == "auto":
        return 4 if gpu == "cpu" else 2
    return {"fp32": 4, "fp64": 8}.get(chosen, 2)


def fitting(
    config: RunConfig, record: dict[str, Any], derived: Derived, machine: Machine, width: int
) -> tuple[Derived, dict[str, int]]:
    """The portions of a step and the memory they take; under `train.micro_batch_size: auto` the largest that fit, as a
    run would find them: a rank's whole share of a step, then half as many."""
    rows = derived.rows
    while True:
        held = memory(config, record, machine.world, derived.rows, derived.micro_steps, width)
        fits = machine.memory is None or held["total"] <= machine.memory
        if config.train.micro_batch_size != "auto" or fits or rows == 1:
            return derived, held
        rows = -(-rows // 2)
        derived = derive(config, machine.world, _Unprepared(), rows)


def short(
    config: RunConfig, machine: Machine, shapes: Callable[[RunConfig], dict[str, Any]], need: int, room: int
) -> RunError:
    """Too little memory, as a sentence that says by how much and what would help, each of it tried."""
    helps = []
    for text, changed, other in remedies(config, machine):
        try:
            derived = derive(changed, other.world, _Unprepared())
        except RunError:
            continue
        width = exchange_width(changed, other.gpu)
        _, held = fitting(changed, shapes(changed), derived, other, width)
        if held["total"] <= room:
            helps.append(f"{text} ({gigabytes(held['total'])})")
        if len(helps) == 3:
            break
    return RunError(
        f"a rank needs {gigabytes(need)} and {GPUS[machine.gpu][0]} has {gigabytes(room)} for tensors: "
        f"{gigabytes(need - room)} too much",
        where="train, parallel",
        mend="; or ".join(helps) if helps else "nothing of smaller micro-batches, recomputation and more ranks is enough: "
        "take a GPU with more memory or a smaller model",
    )  # fmt: skip


def remedies(config: RunConfig, machine: Machine) -> Iterator[tuple[str, RunConfig, Machine]]:
    """What may help, least costly first: (what to set, the configuration, the machine)."""
    train = config.train
    if train.micro_batch_size not in ("auto", 1):
        yield "train.micro_batch_size: 1", replace(config, train=replace(train, micro_batch_size=1)), machine
    chunked = replace(train, loss_chunk=train.loss_chunk or CHUNK)
    if train.loss_chunk is None:
        yield f"train.loss_chunk: {CHUNK}", replace(config, train=chunked), machine
    if train.activation_checkpointing != "full":
        full = replace(chunked, activation_checkpointing="full")
        text = "train.activation_checkpointing: full" + ("" if train.loss_chunk else f" and train.loss_chunk: {CHUNK}")
        yield text, replace(config, train=full), machine
        if train.micro_batch_size not in ("auto", 1):
            one = replace(config, train=replace(full, micro_batch_size=1))
            yield f"{text} and train.micro_batch_size: 1", one, machine
    if config.parallel.name in ("single", "ddp"):
        options = registry.alternatives("trainer.parallel")["fsdp2"].Options()
        yield "parallel.name: fsdp2", replace(config, parallel=options), machine
    for factor in (2, 4, 8, 16):
        more = replace(machine, nodes=machine.nodes * factor)
        if config.parallel.name == "fsdp2" and more.world <= MOST_RANKS:
            yield f"--nodes={more.nodes}", config, more


def gigabytes(size: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def times(
    config: RunConfig,
    machine: Machine,
    steps: int | None,
    derived: Derived,
    seconds: float | None,
    flops: int | None,
    assumed: list[str],
) -> dict[str, Any]:
    """Speed, length, and what was assumed."""
    tokens = derived.sequences_per_step * config.data.sequence_length
    total = None if steps is None or seconds is None else steps * seconds
    limit = machine.time_limit if machine.time_limit is not None else config.train.time_limit
    return {
        "seconds per step": seconds,
        "tokens per second": None if seconds is None else tokens / seconds,
        "mfu": utilization(machine, config, flops, tokens, seconds),
        "steps": steps,
        "tokens": None if steps is None else derived.sequences * config.data.sequence_length,
        "hours": None if total is None else total / 3600,
        "gpu hours": None if total is None else total / 3600 * machine.world,
        "hours per billion tokens": None if seconds is None else seconds / tokens * 1e9 / 3600,
        "time limit": limit,
        "assumed": assumed + (["data is not prepared: the length of an epoch is not known"] if steps is None else []),
    }


def utilization(
    machine: Machine, config: RunConfig, flops: int | None, tokens: int, seconds: float | None
) -> float | None:
    """The share of the peak that the model's operations reach once the update and empty rows are counted."""
    if machine.gpu == "cpu" or seconds is None or flops is None:
        return None
    peak = peak_of(GPUS[machine.gpu][0], config.train.precision)
    return None if peak is None else flops * tokens / seconds / (peak * machine.world)


def saving(
    config: RunConfig,
    machine: Machine,
    record: dict[str, Any],
    steps: int | None,
    seconds: float | None,
    known: plan_time.Measured,
) -> dict[str, Any]:
    """Disk, save interval and requeues."""
    one = checkpoint_bytes(record)
    export = sum(4 * math.prod(p["shape"]) for p in record["parameters"]) if config.finish.export else 0
    home = next(path for path in (config.folder.absolute(), *config.folder.absolute().parents) if path.exists())
    save, how = machine.save_seconds, "given"
    if save is None:
        save, how = known.save_seconds, f"measured in {config.folder}"
    if save is None:
        rate = plan_time.WRITE_BYTES * machine.nodes
        save, how = one / rate, f"assumed: {gigabytes(plan_time.WRITE_BYTES)}/s per node, written, hashed and synced"
    failure = machine.failure_hours * 3600 / machine.world
    best = plan_time.save_interval(save, failure)
    every = plan_time.interval_seconds(config, seconds)
    limit = machine.time_limit if machine.time_limit is not None else config.train.time_limit
    again = None
    if limit is not None and steps is not None and seconds is not None:
        again = plan_time.requeues(steps * seconds, limit, save, NOTICE)
        if again is None:
            raise RunError(
                f"a time limit of {limit / 60:.0f} min leaves nothing for training: {plan_time.START_SECONDS:.0f} s start, "
                f"{NOTICE:.0f} s notice and {save:.0f} s for the save",
                where="--time-limit, train.time_limit",
                mend="raise it",
            )
    return {
        "disk": {
            "checkpoint": one, "kept": config.checkpoint.keep, "export": export,
            "total": (config.checkpoint.keep + 1) * one + export, "free": shutil.disk_usage(home).free, "where": str(home),
        },
        "saves": {
            "seconds": save, "how": how, "hours between failures": failure / 3600,
            "failure hours": machine.failure_hours, "best interval": best, "every": config.checkpoint.every,
            "every seconds": every, "lost at best": plan_time.lost_share(save, best, failure),
            "lost": None if every is None else plan_time.lost_share(save, every, failure),
        },
        "requeues": again,
    }  # fmt: skip
