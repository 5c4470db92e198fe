"""Bytes that a rank sends in one step, by kind, and who orthogonalizes what; from shapes alone.

Sent bytes are those of the algorithms that send least: (P-1)/P of the whole for a gather or a reduce-scatter among P
ranks, twice that for an all-reduce. What a library sends beside them (headers, retries) is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.plan_memory import FP32, Spread, as_stored, local, spread, stored
from trainer.optim.plan import imbalance, own, volumes, work
from trainer.optim.sides import words

if TYPE_CHECKING:
    from trainer.config import RunConfig


def wire(config: RunConfig, parameters: Sequence[dict[str, Any]], world: int, micro_steps: int) -> dict[str, float]:
    """Bytes that a rank sends in one step for weights and gradients; the optimizer's exchange is in `owners`."""
    mesh, name = spread(config, world), config.parallel.name
    if name == "fsdp2":
        return sharded(config, parameters, mesh, micro_steps)
    whole = FP32 * sum(math.prod(p["shape"]) for p in parameters)
    share = (world - 1) / world
    if name == "deepspeed":
        stage, compute = config.parallel.stage, FP32
        gathers = 2 * micro_steps if stage == 3 else 1
        reductions = 1 if stage == 1 else micro_steps
        return {"all-gather": share * whole * gathers * compute / FP32, "reduce-scatter": share * whole * reductions}
    return {"all-reduce": 2 * share * whole}


def sharded(
    config: RunConfig, parameters: Sequence[dict[str, Any]], mesh: Spread, micro_steps: int
) -> dict[str, float]:
    """FSDP2: weights are gathered for each forward, and once more for the backward where a block was freed; gradients are
    reduced in fp32 once per micro-step or step, and over replicas once per step. Shards are padded to equal rows."""
    compute = 2 if config.train.precision == "bf16" else FP32
    units: dict[int, int] = {}
    for p in parameters:
        units[p["unit"]] = units.get(p["unit"], 0) + local(p["shape"], mesh.parts)
    shard, last = sum(units.values()), max(units)
    freed = sum(size for unit, size in units.items() if unit not in (-1, last))
    gathers = micro_steps * (shard + (freed if config.parallel.reshard_after_forward else 0))
    reductions = micro_steps if config.parallel.sync_every_micro_step else 1
    found = {
        "all-gather": float(compute * gathers * (mesh.parts - 1)),
        "reduce-scatter": float(FP32 * shard * reductions * (mesh.parts - 1)),
    }
    if mesh.copies > 1:
        found["all-reduce"] = 2 * FP32 * shard * (mesh.copies - 1) / mesh.copies
    return found


def owners(config: RunConfig, parameters: Sequence[dict[str, Any]], world: int, width: int) -> dict[str, float]:
    """Of a matrix rule: matrices, bytes sent by the mean and the busiest rank, `imbalance` (work of the busiest rank over
    the mean), `work` (operations of one Newton-Schulz step on the busiest rank). Empty for other rules.

    Args:
        width: bytes of an entry on its way to the owner of its matrix.
    """
    mesh = spread(config, world)
    matrices = stored(parameters, mesh.sharded)
    if not matrices:
        return {}
    divided = not mesh.sharded or config.parallel.spread_replicas
    copies = mesh.copies if divided else 1
    owned = own(matrices, mesh.parts, copies)
    sent = [pair[0] for pair in volumes(matrices, owned, mesh.parts, copies, width)]
    for kind, entry in statistics(parameters).items():
        more = volumes(matrices, owned, mesh.parts, copies, entry, kind)
        sent = [a + b for a, (b, _) in zip(sent, more, strict=True)]
    total = sum(work(m.shape) for m in owned)
    uneven = imbalance(owned, mesh.parts * copies)
    return {
        "matrices": len(owned), "mean": sum(sent) / len(sent), "most": max(sent), "imbalance": uneven,
        "work": uneven * total / (mesh.parts * copies),
    }  # fmt: skip


def low_rank(config: RunConfig, parameters: Sequence[dict[str, Any]], world: int) -> float:
    """Bytes that the mean rank sends in one step for a rule that turns shards (fp32) or adds up over them (float64)."""
    mesh = spread(config, world)
    if not mesh.sharded or mesh.parts == 1:
        return 0.0
    total = 0.0
    for p in parameters:
        if p["cut"]:
            turned, width = p["cut"]
            total += (
                FP32 * sum(sent for sent, _ in words(as_stored(p, True), bool(turned), width, mesh.parts)) / mesh.parts
            )
        total += 8 * 2 * (mesh.parts - 1) / mesh.parts * p["sums"]
    return total


def statistics(parameters: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Statistics that travel with the matrices: `rows` (one value for each row) or `columns`, and the bytes of a value."""
    found = {}
    for p in parameters:
        for shape, width in p["state"].values() if p["whole"] else ():
            if len(shape) == len(p["shape"]) and shape != p["shape"]:
                columns = shape[-2 if p["transposed"] else -1]
                found["rows" if columns == 1 else "columns"] = width
    return found
