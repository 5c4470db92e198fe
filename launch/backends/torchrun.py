"""torchrun on this machine, in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.config import RunConfig
from trainer.outcome import Outcome, read_outcome

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SHUTDOWN_SECONDS = 600


def ranks(config: RunConfig) -> int:
    """Processes to start here: as configured, else one per visible GPU, else one."""
    if config.resources.ranks is not None:
        return config.resources.ranks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if config.resources.device == "cpu":
        return 1
    count = len([d for d in visible.split(",") if d]) if visible is not None else len(_gpus())
    return max(1, count)


def command(config: RunConfig, folder: Path, attempt: int) -> list[str]:
    """The torchrun command of an attempt. torchrun must not restart: that would retry what is deterministic."""
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc-per-node={ranks(config)}",
        "--max-restarts=0", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    ]  # fmt: skip
    major, minor = (int(part) for part in metadata.version("torch").split(".")[:2])
    if (major, minor) >= (2, 13):
        line.append(f"--shutdown-timeout={SHUTDOWN_SECONDS}")
    return [*line, "-m", "trainer", "train", str(folder), f"--attempt={attempt}"]


def run(config: RunConfig, folder: Path, attempt: int) -> dict[str, Any]:
    """Run an attempt to its end and return its outcome; signals to this process go on to the ranks."""
    logs = folder / "logs" / str(attempt)
    environment = os.environ | {"OMP_NUM_THREADS": str(config.resources.threads_per_rank)}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    with open(logs / "torchrun.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(command(config, folder, attempt), stderr=log, env=environment, start_new_session=True)

        def forward(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    outcome = read_outcome(logs)
    if outcome["outcome"] == Outcome.FINISHED.value and child.returncode != 0:
        outcome = {**outcome, "message": f"{outcome['message']} (torchrun ended with {child.returncode})"}
    return outcome


def _gpus() -> list[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
