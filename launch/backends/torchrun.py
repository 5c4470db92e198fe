"""torchrun on this machine: runs in the background, its command lines, and tasks that it runs on several ranks.

A run in the background is `orthogon resume` in a session of its own, which the end of a terminal does not reach: it makes
attempts as `launch/retry.py` says. What it prints, rank 0's progress too, goes to `logs/launcher.log`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import attempt, children, evidence, handles, process, warm
from launch.retry import RESTARTS
from trainer import lock
from trainer.files import write_json
from trainer.outcome import Outcome, RunError, read_outcome
from trainer.registry import STRICT

if TYPE_CHECKING:
    from trainer.config import RunConfig

LOG = "launcher.log"
EARLY_SECONDS = 5.0
"""In which a supervisor that was just started catches signals, or has died of one."""
MORE_SECONDS = 30
"""What torchrun waits for its ranks beyond the time in which they promise to answer a signal."""
NODE = ("--standalone", "--nnodes=1")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be said about a run in the background of this machine."""

    __pydantic_config__ = STRICT
    restarts: int = RESTARTS
    """Restarts in a row that may pass without a newer checkpoint; 0 makes one attempt only."""


def submit(
    config: RunConfig, folder: Path, options: Options, *, resume: bool, after: list[str] | None = None
) -> dict[str, Any]:
    """Start the supervisor of a run in the background; the handle is what tells its process from all others.

    Raises:
        RunError: the run should wait for others (`launch/pipeline.py` does that here), or the log cannot be written.
    """
    if after:
        raise RunError(
            "torchrun on this machine cannot wait for other runs",
            where="command line, --after",
            mend="start it when they are finished, or let a pipeline do it",
        )
    try:
        with open(folder / "logs" / LOG, "a", encoding="utf-8") as log:
            environment = process.environment(PYTHONUNBUFFERED="1", **{handles.SUBMITTED: "1"})
            line = _line(folder, options)
            pid = warm.start(line[3:], log, environment) if forkable(config) else None
            if pid is None:
                pid = subprocess.Popen(
                    line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
                ).pid
    except OSError as error:
        raise RunError(
            f"the run cannot be started: {error.strerror}",
            where=str(folder / "logs"),
            mend="make room, or make it writable",
            outcome=Outcome.of_errno(error.errno),
        ) from None
    try:
        return handles.identity(pid)
    except ProcessLookupError:  # a fork that ended at once leaves nothing to look at
        raise RunError(
            "the run ended at once",
            where=str(folder / "logs" / LOG),
            mend="read this log",
            outcome=Outcome.INFRASTRUCTURE,
        ) from None


def state(folder: Path, handle: dict[str, Any]) -> tuple[str, str]:
    """Whether the supervisor lives; asked on another host, that cannot be told."""
    who = f"pid {handle.get('pid')} on {handle.get('host')}"
    if handle.get("host") != socket.gethostname():
        return "unknown", f"its launcher, {who}, cannot be seen from here"
    if _lives(handle):
        return "running", f"its launcher is {who}"
    word = handles.last_word(folder, handle)
    if word is not None:
        return "ended", str(word["message"] or f"its launcher ended with exit code {word['exit_code']}")
    said = evidence.last_lines(folder / "logs" / LOG, 1)
    return "vanished", f"its launcher, {who}, is gone without a word" + (f"; it said last: {said[0]}" if said else "")


def logs(folder: Path, handle: dict[str, Any]) -> list[Path]:
    """The logs of the ranks, of torchrun and of the launcher."""
    return [*evidence.logs_of(folder), *filter(Path.exists, [folder / "logs" / LOG])]


def cancel(folder: Path, handle: dict[str, Any], now: bool) -> str:
    """Ask the supervisor to let the ranks save and end; or kill it with all below it, and put that on record."""
    word, detail = state(folder, handle)
    if word == "unknown":
        raise RunError(detail, where=str(folder / handles.FILE), mend=f"cancel it on {handle.get('host')}")
    pid = int(handle.get("pid", 0))
    with suppress(ProcessLookupError):
        if word != "running":
            return f"run {folder.name} is not running: {detail}"
        if not now:
            os.kill(pid, signal.SIGTERM)
            _note_early_end(folder, handle)
            return f"asked run {folder.name} (pid {pid}) to save and end"
        os.kill(pid, signal.SIGSTOP)  # it would start the next attempt
        for one in [*children.descendants(pid), pid]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        until = time.monotonic() + children.UNKILLABLE_SECONDS
        while _lives(handle) and time.monotonic() < until:  # a busy machine takes its time
            time.sleep(0.01)
        _record_kill(folder, handle, "cancelled at once")
    return f"killed run {folder.name} (pid {pid}) with all its ranks; steps since the newest checkpoint are lost"


def describe(config: RunConfig, folder: Path, options: Options) -> str:
    """The command of the supervisor, and the one that it starts for each attempt."""
    first = attempt_command(config, folder, 1)
    return f"in the background: {' '.join(_line(folder, options))}\neach attempt: {' '.join(first)}"


def _line(folder: Path, options: Options) -> list[str]:
    return [
        sys.executable, "-m", "launch.cli", "resume", folder.name, f"--runs={folder.parent}", f"--restarts={options.restarts}",
    ]  # fmt: skip


def _lives(handle: dict[str, Any]) -> bool:
    try:
        return lock.start_of(int(handle["pid"])) == int(handle["started"])
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:  # of another user
        return True


def _note_early_end(folder: Path, handle: dict[str, Any]) -> None:
    """A supervisor that is too young to catch the signal dies of it; nothing is lost then, and somebody has to say so."""
    until = time.monotonic() + EARLY_SECONDS
    while time.monotonic() < until and evidence.newest_attempt(folder) <= handle.get("attempts", 0):
        if not _lives(handle):
            if handles.last_word(folder, handle) is None:
                _record_kill(folder, handle, "cancelled before its first attempt")
            return
        time.sleep(0.05)


def _record_kill(folder: Path, handle: dict[str, Any], why: str) -> None:
    """What the supervisor would have written."""
    number = evidence.newest_attempt(folder)
    logs = folder / "logs" / str(number)
    with suppress(OSError):
        if number > handle.get("attempts", 0) and evidence.record(logs / attempt.FILE) is None:
            attempt.close(folder, number, True, logs.stat().st_ctime, why)
        same = {key: handle[key] for key in ("pid", "started", "host")}
        end = {"exit_code": Outcome.INFRASTRUCTURE.code, "message": why, "time": time.time()}
        write_json(folder / "logs" / handles.LAST_WORD, same | end)


def ranks(config: RunConfig) -> int:
    """Processes to start here: as configured, else one per visible GPU, else one."""
    if config.resources.ranks is not None:
        return config.resources.ranks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if config.resources.device == "cpu":
        return 1
    count = len([d for d in visible.split(",") if d]) if visible is not None else len(gpus())
    return max(1, count)


def forkable(config: RunConfig) -> bool:
    """Whether a warm process can start a run (`launch/warm.py`): one rank on the CPU, since no fork inherits a device."""
    return ranks(config) == 1 and (config.resources.device == "cpu" or not gpus())


def attempt_command(config: RunConfig, folder: Path, number: int, node: tuple[str, ...] = NODE) -> list[str]:
    """The torchrun command of an attempt; `node` tells where the ranks of all nodes meet."""
    return command(config, "train", str(folder), f"--attempt={number}", node=node)


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
    child: children.Child
    with open(folder / "task.log", "w", encoding="utf-8") as log:
        if alone or ranks(config) == 1:
            child = process.begin(task, variables(config), log)
        else:
            line = command(config, *task)
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


def gpus() -> list[Path]:
    """The NVIDIA devices of this machine."""
    return [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
