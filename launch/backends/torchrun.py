"""torchrun on this machine: its command lines, and tasks that it runs on several ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import process
from trainer.outcome import Outcome, read_outcome

if TYPE_CHECKING:
    from trainer.config import RunConfig

MORE_SECONDS = 30
"""What torchrun waits for its ranks beyond the time in which they promise to answer a signal."""
NODE = ("--standalone", "--nnodes=1")


def ranks(config: RunConfig) -> int:
    """Processes to start here: as configured, else one per visible GPU, else one."""
    if config.resources.ranks is not None:
        return config.resources.ranks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if config.resources.device == "cpu":
        return 1
    count = len([d for d in visible.split(",") if d]) if visible is not None else len(_gpus())
    return max(1, count)


def attempt_command(config: RunConfig, folder: Path, attempt: int, node: tuple[str, ...] = NODE) -> list[str]:
    """The torchrun command of an attempt; `node` tells where the ranks of all nodes meet."""
    return command(config, "train", str(folder), f"--attempt={attempt}", node=node)


def command(config: RunConfig, *task: str, node: tuple[str, ...] = NODE) -> list[str]:
    """`python -m trainer TASK` on every rank. torchrun must not restart: that would retry what is deterministic."""
    line = [
        sys.executable, "-m", "torch.distributed.run", *node, f"--nproc-per-node={ranks(config)}",
        "--max-restarts=0", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    ]  # fmt: skip
    major, minor = (int(part) for part in metadata.version("torch").split(".")[:2])
    if (major, minor) >= (2, 13):
        line.append(f"--shutdown-timeout={shutdown_seconds(config)}")
    return [*line, "-m", "trainer", *task]


def shutdown_seconds(config: RunConfig) -> int:
    """What torchrun gives the ranks to save after it passed a signal on."""
    return math.ceil(config.guard.stop_timeout) + MORE_SECONDS


def variables(config: RunConfig) -> dict[str, str]:
    """The environment of torchrun."""
    found = process.environment(OMP_NUM_THREADS=str(config.resources.threads_per_rank))
    found.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(shutdown_seconds(config)))
    return found


def answer(config: RunConfig, *task: str, alone: bool = False) -> Any:
    """Run a task on the ranks that `config` asks for, or in one process; returns the JSON that it leaves in `--answer`.

    A task that ends with a sentence ends this process with that sentence; one that breaks leaves its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="orthogon-"))
    task = (*task, f"--answer={folder}")
    line = [sys.executable, "-m", "trainer", *task] if alone or ranks(config) == 1 else command(config, *task)
    with open(folder / "task.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(line, stderr=log, env=variables(config), start_new_session=True)
        _, passed = process.wait(child)
    if passed is None and (folder / "answer.json").exists():
        value = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        shutil.rmtree(folder)
        return value
    outcome = read_outcome(folder)
    if passed is None:
        print(outcome["message"], file=sys.stderr)
    if passed is None and outcome["outcome"] in (Outcome.BUG.value, Outcome.INFRASTRUCTURE.value):
        print(f"log: {folder}/task.log", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    sys.exit(outcome["exit_code"] if passed is None else 128 + passed)


def _gpus() -> list[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
