"""What our loop costs over a bare one: the same model, batch and optimizer, alternating in one process group.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py [--steps 20] [--rounds 5]

Starts itself at 1 and 2 ranks. A bare step is forward, backward, optimizer and nothing else: no verdict, no clipping,
no history, no schedule. "measured" is our step with the figures of all parameter groups, which a run takes every
`metrics.groups_every` steps. Prints medians with minimum and maximum, and the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        measure(arguments.folder, arguments.steps, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__,
                f"--folder={folder}/{world}", f"--steps={arguments.steps}", f"--rounds={arguments.rounds}",
            ]  # fmt: skip
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=environment, cwd=ROOT)


def measure(folder: Path, steps: int, rounds: int) -> None:
    """One world size: rounds of (ours, bare), each of `steps` steps."""
    from trainer import config as configuration
    from trainer import distributed, loop, runfolder, setup
    from trainer.guard.heartbeat import Heartbeat
    from trainer.guard.signals import Flag
    from trainer.guard.watchdog import Watchdog
    from trainer.model.loss import summed_loss

    overrides = [f"--runs={folder}", "--train.length=100000 steps", "--schedule.name=constant"]
    config = configuration.load(ROOT / "configs" / "quickstart.yaml", overrides)
    if int(os.environ["RANK"]) == 0:
        runfolder.create(config, ["benchmark"])
    while not (config.folder / "checkpoints").exists():
        time.sleep(0.05)
    rank = int(os.environ["RANK"])
    watch = Watchdog(Heartbeat(config.folder / f"heartbeat-{rank}"), Flag(), config.folder, rank).start()
    run = setup.set_up(config.folder, config, 1, watch)
    run.progress.shown = False
    expected = run.derived.sequences_per_step * config.data.sequence_length

    def ours(every: int | None = None) -> None:
        run.groups.every = every
        loop.step(run)
        run.heart.beat("border", run.step, run.position)

    fixed = run.batches.at(0, run.derived.sequences_per_step)

    def bare() -> None:
        for batch in fixed:
            (summed_loss(run.strategy.forward, *batch) / expected).backward()
        run.optimizer.step()
        for parameter in run.parameters:
            parameter.grad = None

    variants = (("measured", lambda: ours(1)), ("ours", ours), ("bare", bare))
    times: dict[str, list[float]] = {name: [] for name, _ in variants}
    ours(1), ours(), bare()  # warm up
    for _ in range(rounds):
        for name, step in variants:
            began = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - began) / steps)
    if distributed.rank() == 0:
        print("| ranks | step | median s | min | max |\n|---|---|---|---|---|")
        for name, values in times.items():
            print(
                f"| {distributed.world()} | {name} | {statistics.median(values):.4f} | {min(values):.4f} | {max(values):.4f} |"
            )
        for above, below in (("ours", "bare"), ("measured", "ours")):
            ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
            print(
                f"| {distributed.world()} | {above} / {below} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
            )
    distributed.stop()


if __name__ == "__main__":
    main()
