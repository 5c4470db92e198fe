"""What an optimizer step costs: time, bytes, memory, side by side in one process group of two ranks on this machine.

Ours (NorMuon, also with a 4-step preset), microsoft/dion's NorMuon where `--peer PATH` names a checkout of it,
torch.optim.Muon on replicated parameters, and AdamW; or, with `--family`, all of ours. A step is timed from a barrier to the slower rank's end, the
contestants take turns, and the figures are medians (least to most). Memory is the rise of the peak resident set over a
step, in processes of their own in which freed memory goes back to the system at once.

    python benchmarks/optimizer_step.py [--peer PATH | --family] [--rounds 7] [--model llama|squares]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

MODELS = {
    "llama": ("12 layers d = 512, ffn 1376", [(512, 512)] * 48 + [(1376, 512)] * 24 + [(512, 1376)] * 12),
    "squares": ("24 x 1024 x 1024", [(1024, 1024)] * 24),
}
RANKS = 2
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "NorMuon": ("NorMuon", {}),
    "NorMuon 4 steps": ("NorMuon", {"polar": "quintic-4", "polar_prescale": "schatten"}),
    "Muon": ("Muon", {}),
    "ROOT": ("ROOT", {}),
    "Hybrid-AuON, 1 step": ("HybridAuON", {}),
    "AuON": ("AuON", {}),
    "AuON, unit-rms": ("AuON", {"mode": "unit-rms"}),
    "Trion, r = 64": ("Trion", {"rank": 64}),
    "DCT-AdamW, r = 64, T = 50": ("DCTAdamW", {"rank": 64, "refresh": 50}),
    "DCT-AdamW, r = 64, T = 1": ("DCTAdamW", {"rank": 64}),
    "AdamW": ("AdamW", {}),
}
PEERS = ["NorMuon", "NorMuon 4 steps", "dion NorMuon", "replicated Muon", "AdamW"]
FAMILY = [name for name in OURS if not name.startswith("NorMuon 4")]
ROOT = Path(__file__).parents[1]


def contestant(name: str, shapes: list[tuple[int, int]], peer: str | None) -> Any:
    """An optimizer over fresh parameters that have gradients."""
    mesh = init_device_mesh("cpu", (RANKS,))
    weights = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(index)
        full, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        if name != "replicated Muon":
            full, gradient = (distribute_tensor(t, mesh, [Shard(0)]) for t in (full, gradient))
        weight = nn.Parameter(full)
        weight.grad = gradient
        weights.append(weight)
    if name == "replicated Muon":
        return torch.optim.Muon(weights, lr=1e-3, nesterov=False)
    if name == "dion NorMuon":
        assert peer
        sys.path.insert(0, peer)
        from dion.normuon import NorMuon as Peer

        return Peer(weights, distributed_mesh=mesh, lr=1e-3)
    from trainer import optim

    kind, options = OURS[name]
    return getattr(optim, kind)(weights, lr=1e-3, **options)


def peak_rise(step: Any) -> int:
    """Bytes by which a call lifts the peak resident set of this process."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo")
    names, shapes = arguments.names.split(";"), MODELS[arguments.model][1]
    counted = [0]  # bytes to other ranks, through either of torch's all-to-alls
    single, lists = dist.all_to_all_single, dist.all_to_all

    def count_single(output: Any, tensor: Any, out_sizes: Any, in_sizes: Any, **options: Any) -> Any:
        counted[0] += sum(size for rank, size in enumerate(in_sizes) if rank != dist.get_rank()) * tensor.element_size()
        return single(output, tensor, out_sizes, in_sizes, **options)

    def count_lists(outputs: Any, tensors: Any, **options: Any) -> Any:
        counted[0] += sum(t.numel() * t.element_size() for rank, t in enumerate(tensors) if rank != dist.get_rank())
        return lists(outputs, tensors, **options)

    dist.all_to_all_single, dist.all_to_all = count_single, count_lists
    optimizers = {name: contestant(name, shapes, arguments.peer) for name in names}
    for optimizer in optimizers.values():
        for _ in range(2):
            optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, int] = {}
    rise: dict[str, int] = {}
    for _ in range(arguments.rounds):
        for name, optimizer in optimizers.items():
            dist.barrier()
            counted[0] = 0
            began = time.perf_counter()
            if arguments.memory:
                rise[name] = peak_rise(optimizer.step)
            else:
                optimizer.step()
            took = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[name].append(float(took))
            sent[name] = counted[0]
    if dist.get_rank() == 0:
        Path(arguments.out).write_text(json.dumps({"times": times, "sent": sent, "rise": rise}))
    dist.destroy_process_group()


def launch(names: list[str], rounds: int, arguments: argparse.Namespace, environment: dict[str, str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__,
            "--names", ";".join(names), "--rounds", str(rounds), "--model", arguments.model, "--out", out,
        ]  # fmt: skip
        command += ["--peer", arguments.peer] if arguments.peer else []
        command += ["--memory"] if environment else []
        subprocess.run(
            command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
        )
        return json.loads(Path(out).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", help="checkout of microsoft/dion")
    parser.add_argument("--family", action="store_true", help="all of our rules")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--names", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.names:
        worker(arguments)
        return
    names = FAMILY if arguments.family else [name for name in PEERS if arguments.peer or "dion" not in name]
    timed = launch(names, arguments.rounds, arguments, {})
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    memory = {name: launch([name], 2, arguments, at_once)["rise"][name] for name in names}
    title, shapes = MODELS[arguments.model]
    optimum = sum(2 * m * n / RANKS * (1 - 1 / RANKS) * 2 for m, n in shapes)
    print(f"{title}; {RANKS} ranks, one thread each, torch {torch.__version__}, gloo")
    bases = ["Muon", "AdamW"] if arguments.family else ["NorMuon"]
    print(
        f"| optimizer | step, s | least to most | {' | '.join(f'to {b}' for b in bases)} | MB to other ranks | peak memory, MB |"
    )
    print("|---|---|---" + "|---" * len(bases) + "|---|---|")
    for name in names:
        seconds = timed["times"][name]
        ratios = [
            statistics.median(a / b for a, b in zip(seconds, timed["times"][base], strict=True)) for base in bases
        ]
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} to {max(seconds):.3f} | {' | '.join(f'{r:.2f}' for r in ratios)} "
            f"| {timed['sent'][name] / 1e6:.1f} | {memory[name] / 1e6:.0f} |"
        )
    print(f"unpadded optimum: {optimum / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
