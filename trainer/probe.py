"""What only a process with torch can tell of a machine: versions, GPUs, a compiler, and how fast its ranks add up."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from trainer import distributed
from trainer.model.prepare import check_compiler
from trainer.outcome import RunError

SIZES = {"cuda": 2**26, "cpu": 2**20}
"""Entries (fp32) of the tensor that the ranks sum: as large as a gradient bucket is on such devices."""
ROUNDS = 5


def device_facts() -> dict[str, Any]:
    """Versions, GPUs by name and free memory, a product on each, and whether `train.compile` finds its compiler."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "compiler": ""}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        ones = torch.ones(256, 256, device=device)
        sound = bool(((ones @ ones) == 256).all())
        facts["gpus"].append({"name": torch.cuda.get_device_name(device), "free": free, "total": total, "sound": sound})
    try:
        check_compiler(torch.device("cuda" if facts["gpus"] else "cpu"))
    except RunError as error:
        facts["compiler"] = f"{error.what}; {error.mend}"
    return facts


def all_reduce(device: torch.device) -> dict[str, Any]:
    """Sum a tensor over the ranks, on NCCL or gloo: whether the sum is right, and bytes per second on the wire.

    The bandwidth is that of the algorithm that sends least, 2 (P-1)/P of the tensor, over the median of some rounds.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    seconds, right, size = [], True, SIZES[device.type]
    for _ in range(ROUNDS + 1):
        tensor = torch.full((size,), float(rank + 1), device=device)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(tensor)
        right = right and bool((tensor == world * (world + 1) / 2).all())  # waits for the device
        seconds.append(time.monotonic() - began)
    median = sorted(seconds[1:])[ROUNDS // 2]  # the first makes connections
    wrong = distributed.sum_over_ranks([float(not right)], device)[0]
    sent = 2 * (world - 1) / world * 4 * size
    backend = "nccl" if device.type == "cuda" else "gloo"
    return {
        "rank": rank, "backend": backend, "ranks": world, "right": not wrong, "seconds": median,
        "bytes_per_second": sent / median,
    }  # fmt: skip
