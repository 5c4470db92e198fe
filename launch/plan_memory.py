"""Bytes that a rank holds, by category, under each parallel strategy; from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.optim.plan import Stored, buckets

if TYPE_CHECKING:
    from trainer.config import RunConfig

FP32 = 4
BUCKET = 16 * 2**20
"""`bucket_bytes` of the optimizer: most bytes of shards in one exchange, counted as bf16."""
IN_FLIGHT = 12
"""Working memory of an update, in shards of its largest bucket; the bound that tests/dist/test_step_cost.py keeps."""


@dataclass(frozen=True)
class Spread:
    """How many ranks share each parameter's shards, and how many groups of them there are."""

    parts: int
    copies: int
    sharded: bool

    @property
    def world(self) -> int:
        return self.parts * self.copies


def spread(config: RunConfig, world: int) -> Spread:
    """The mesh of a strategy on so many ranks."""
    if config.parallel.name == "fsdp2":
        return Spread(world // config.parallel.replicate, config.parallel.replicate, True)
    return Spread(1, world, False)


def chunk(size: int, parts: int) -> int:
    """Rows of the largest shard, as FSDP2 cuts them."""
    return -(-size // parts)


def local(shape: Sequence[int], parts: int) -> int:
    """Entries of the first (and largest) of `parts` shards by rows."""
    return chunk(shape[0], parts) * math.prod(shape[1:]) if shape else 1


def state_bytes(parameter: dict[str, Any], parts: int) -> int:
    """Optimizer state of a parameter on the first rank: sharded where it has the parameter's rows, and the state of a
    low-rank rule along the long side, which is the last one of a weight that is stored transposed; else whole."""
    total = 0
    for shape, width in parameter["state"].values():
        if len(shape) != len(parameter["shape"]):
            total += width * math.prod(shape)
        elif shape[0] == parameter["shape"][0]:
            total += width * local(shape, parts)
        elif parameter["cut"]:
            total += width * local(shape[::-1] if parameter["transposed"] else shape, parts)
        else:
            total += width * math.prod(shape)
    return total


def stored(parameters: Sequence[dict[str, Any]], sharded: bool) -> list[Stored]:
    """The matrices of a matrix rule as `trainer.optim.plan` knows them."""
    return [as_stored(p, sharded) for p in parameters if p["whole"]]


def as_stored(parameter: dict[str, Any], sharded: bool) -> Stored:
    """How a matrix, or a stack of them, lies."""
    experts, rows, columns = parameter["shape"] if len(parameter["shape"]) == 3 else (1, *parameter["shape"])
    dim = 0 if len(parameter["shape"]) == 3 else 1
    if parameter["transposed"]:
        rows, columns, dim = columns, rows, 2 if dim == 1 else 0
    return Stored((experts, rows, columns), dim if sharded else None, tuple(parameter["blocks"]))


def memory(
    config: RunConfig, record: dict[str, Any], world: int, rows: int, micro_steps: int, width: int
) -> dict[str, int]:
    """Bytes on the rank that holds most, by category, and `total`: the larger of what the backward and the update need.

    Args:
        record: the footprint of the model.
        rows: sequences of a micro-step.
        width: bytes of an entry on its way to the owner of its matrix.
    """
    mesh, parameters = spread(config, world), record["parameters"]
    parts = mesh.parts if mesh.sharded else 1
    shard = sum(local(p["shape"], parts) for p in parameters)
    whole = sum(math.prod(p["shape"]) for p in parameters)
    found = {
        "weights": FP32 * shard,
        "gradients": FP32 * shard,
        "optimizer state": sum(state_bytes(p, parts) for p in parameters),
    }
    if config.parallel.name == "deepspeed":
        found = partitioned(config, record, world, whole)
    kept = record["activations"]
    alive, peak = ((kept[key][0] + rows * kept[key][1]) if kept else 0 for key in ("kept", "peak"))
    found |= {"activations": alive, "backward": max(0, peak - alive), "gathered weights, gradients on the way": 0}
    if config.parallel.name == "fsdp2":
        found["gathered weights, gradients on the way"] = gathered(config, parameters, whole, micro_steps)
    found["exchange of the update"] = update(parameters, mesh, width)
    during_backward = (found["activations"], found["backward"], found["gathered weights, gradients on the way"])
    held = found["weights"] + found["gradients"] + found["optimizer state"]
    return found | {"total": held + max(sum(during_backward), found["exchange of the update"])}


def gathered(config: RunConfig, parameters: Sequence[dict[str, Any]], whole: int, micro_steps: int) -> int:
    """FSDP2: weights gathered at a time, and gradients before their reduction. Two blocks, the next one being on its
    way, beside the last block and what belongs to none; or all, where nothing is freed after a forward."""
    compute = 2 if config.train.precision == "bf16" else FP32
    units: dict[int, int] = {}
    for p in parameters:
        units[p["unit"]] = units.get(p["unit"], 0) + math.prod(p["shape"])
    root, last = units.pop(-1, 0), max(units, default=-1)
    largest = max(units.values(), default=0)
    at_once = whole
    if config.parallel.reshard_after_forward:
        at_once = min(whole, root + units.get(last, 0) + 2 * largest)
    reduced = compute * max(largest, root) + FP32 * max(largest, root)  # as computed, and as it is sent
    if not config.parallel.sync_every_micro_step and micro_steps > 1:
        reduced += FP32 * whole
    total: int = compute * at_once + reduced
    return total


def update(parameters: Sequence[dict[str, Any]], mesh: Spread, width: int) -> int:
    """Working memory of a matrix rule: parcels, whole matrices and their products, a few buckets at a time."""
    matrices = stored(parameters, mesh.sharded)
    if not matrices:
        return 0
    sizes = [2 * math.prod(s.shape) if s.dim is None else 2 * -(-math.prod(s.shape) // mesh.parts) for s in matrices]
    largest = max(sum(sizes[i] for i in bucket) for bucket in buckets(matrices, mesh.parts, BUCKET, 2))
    return IN_FLIGHT * largest * width // 2


def partitioned(config: RunConfig, record: dict[str, Any], world: int, whole: int) -> dict[str, int]:
    """ZeRO: what is cut into one partition per rank, by stage; fp32 weights beside fp32 partitions. Not measured."""
    options, part = config.parallel, -(-whole // world)
    state = sum(state_bytes(p, 1) for p in record["parameters"])
    on_device = 0 if options.offload_optimizer else 1
    return {
        "weights": FP32 * (part if options.stage == 3 else whole) * (0 if options.offload_parameters else 1)
        + FP32 * part * on_device,
        "gradients": FP32 * (whole if options.stage == 1 else part),
        "optimizer state": -(-state // world) * on_device,
    }


def checkpoint_bytes(record: dict[str, Any]) -> int:
    """Bytes of one generation: weights, persistent buffers and state, each entry once."""
    weights: int = sum(FP32 * math.prod(p["shape"]) for p in record["parameters"])
    return weights + int(record["buffers"]) + sum(state_bytes(p, 1) for p in record["parameters"])
