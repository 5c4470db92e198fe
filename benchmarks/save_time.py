"""What verification costs a save, and what a save costs training: 2 ranks, a few hundred MB, in alternation.

    torchrun --nproc-per-node 2 benchmarks/save_time.py --megabytes 300 --rounds 5

Compares `dcp.save` with torch's plain FileSystemWriter (fsync is its default), `dcp.save` with the safetensors writer, our
save (that, and fsync, SHA-256 of what is read back, manifest, rename), the same in the background (what the loop waits
for, and until all is on disk). Prints a table of medians; rank 0's times, after a barrier.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.checkpoint.background import Background
from trainer.checkpoint.save import all_finite, save

PLAIN = "dcp.save, FileSystemWriter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tensors = tensors_of(arguments.megabytes)
    place = [tempfile.mkdtemp(dir=arguments.folder)]
    dist.broadcast_object_list(place, src=0)
    folder = Path(place[0])
    background = Background()
    facts = {"config": {}, "state": {}, "lineage": {}, "attempt": 1}
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        times.setdefault(name, []).append(time.perf_counter() - began)

    def plain() -> None:
        timed(PLAIN, lambda: dcp.save(tensors, storage_writer=FileSystemWriter(folder / "plain")))

    def safetensors() -> None:
        writer = HuggingFaceStorageWriter(str(folder / "plain"), save_distributed=True)
        timed("dcp.save, safetensors", lambda: dcp.save(tensors, storage_writer=writer))

    def ours() -> None:
        timed("our save", lambda: save(folder, 1, 1, tensors, **facts))

    def in_background() -> None:
        timed("in the background: the loop waits", lambda: background.start(folder, 1, 1, tensors, **facts))
        timed("in the background: then until on disk", background.finish)

    ways = [plain, safetensors, ours, in_background]
    for number in range(arguments.rounds + 1):
        for way in ways[number % 4 :] + ways[: number % 4]:
            way()
            if dist.get_rank() == 0:
                for path in folder.iterdir():
                    shutil.rmtree(path)
        timed("all_finite", lambda: all_finite(tensors))
        if number == 0:  # the first round warms up
            times.clear()
    if dist.get_rank() == 0:
        report(times, arguments.megabytes)
        shutil.rmtree(folder)
    dist.barrier()
    dist.destroy_process_group()


def tensors_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Rows over the ranks, 8 MB each, of random numbers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    count = max(1, megabytes // 8)
    return {f"model.{i}": distribute_tensor(torch.randn(1000, 2000), mesh, [Shard(0)]) for i in range(count)}


def report(times: dict[str, list[float]], megabytes: int) -> None:
    base = statistics.median(times[PLAIN])
    print(
        f"| {megabytes} MB, {dist.get_world_size()} ranks | median, s | least to most | to plain |\n|---|---|---|---|"
    )
    for name, found in times.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.3f} | {min(found):.3f} to {max(found):.3f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
