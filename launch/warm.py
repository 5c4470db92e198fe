"""A process that has imported torch, and forks what a local pipeline starts: a small run is not outlived by its own start.

The driver keeps it (`kept`) and asks it for processes: `orthogon` commands, supervisors of runs among them. Such a process has all
imports, but no thread and no state of any other run, and it is as independent of the driver as one that was started. It runs
the only rank of a run as a fork of its own (`launch/forks.py`), without torchrun, which would import everything again.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from launch import children, forks, process

MODULES = (
    "launch.cli", "launch.verbs.runs", "launch.verbs.evaluate", "launch.verbs.ensemble", "trainer.setup", "trainer.loop",
    "trainer.tasks", "trainer.evaluate.task", "trainer.ensemble.task", "trainer.ensemble.sample", "trainer.ensemble.cache_task",
    "torch.optim", "torch.distributed.fsdp", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot", "tokenizers", "safetensors.torch", "rich.console", "tyro",
)  # fmt: skip
"""What runs and their commands import, but for what starts threads (`datasets`)."""
_keeper: Keeper | None = None


class Gone(Exception):
    """The warm process does not answer any more."""


class Keeper:
    """The warm process, seen from the process that keeps it."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "launch.warm", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True, env=process.environment(OPENBLAS_NUM_THREADS="1"),
            )  # fmt: skip
        self._one_at_a_time = threading.Lock()
        self.commands: set[int] = set()
        """Pids of commands that somebody waits for."""

    def start(self, words: list[str], out: IO[Any], err: IO[Any], environment: Mapping[str, str], *fds: int) -> int:
        """Begin `orthogon WORDS` in a session of its own; returns its pid. The last of `fds`, if any, gets its exit code.

        Raises:
            Gone: there is no warm process any more.
        """
        request = json.dumps({"words": words, "environment": dict(environment), "folder": os.getcwd()}).encode()
        with self._one_at_a_time, open(os.memfd_create("request"), "w+b") as file:
            file.write(request)  # not into the message: an environment can be longer than one
            file.seek(0)
            try:
                socket.send_fds(self._channel, [b"fork"], [file.fileno(), out.fileno(), err.fileno(), *fds])
                answer = self._channel.recv(32)
            except OSError as error:
                raise Gone(str(error)) from None
            except BaseException:  # Ctrl-C: the answer would be taken for that of another request
                self._channel.close()
                raise
        if not answer:
            raise Gone("it ended")
        return int(answer)

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._channel.close()
        self._child.kill()  # it may still be importing; it holds nothing that could be lost
        self._child.wait()


@contextmanager
def kept(worth: bool) -> Iterator[None]:
    """Keep a warm process meanwhile, if it is worth it, this is Linux, and none is kept already."""
    global _keeper
    if not worth or _keeper is not None or forks.inside or sys.platform != "linux":
        yield
        return
    try:
        _keeper = Keeper()
    except OSError as error:  # no memory, no files
        _lost(Gone(str(error)))
    try:
        yield
    finally:
        keeper, _keeper = _keeper, None
        if keeper is not None:
            keeper.close()


def start(words: list[str], log: IO[Any], environment: Mapping[str, str]) -> int | None:
    """`orthogon WORDS` in the background, with its output in `log`; its pid, or None where no warm process is kept."""
    keeper = _keeper
    if keeper is None:
        return None
    try:
        return keeper.start(words, log, log, environment)
    except Gone as gone:
        _lost(gone)
        return None


def command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`orthogon WORDS` to its end, warm or not, with its output and exit code."""
    keeper = _keeper
    if keeper is not None:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            ours, theirs = os.pipe()
            try:
                pid = keeper.start(words, out, err, process.environment(), theirs)
            except Gone as gone:
                _lost(gone)
            else:
                os.close(theirs)
                keeper.commands.add(pid)
                try:
                    with os.fdopen(ours) as told:
                        code = int(told.read() or -signal.SIGKILL)
                except BaseException:
                    end_commands()
                    raise
                finally:
                    keeper.commands.discard(pid)
                texts = []
                for file in (out, err):
                    file.seek(0)
                    texts.append(file.read())
                return subprocess.CompletedProcess(words, code, *texts)
            os.close(ours)
            os.close(theirs)
    line = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, env=process.environment(), check=False)


def end_commands() -> None:
    """End the commands that are under way: no signal of a terminal reaches them, who are in sessions of their own."""
    for pid in [*_keeper.commands] if _keeper is not None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _lost(gone: Gone) -> None:
    global _keeper
    keeper, _keeper = _keeper, None
    print(f"the warm process is gone ({gone}): what comes now starts by itself, some seconds slower", file=sys.stderr)
    if keeper is not None:
        keeper.close()


# ------------------------------------------------------------------------------------------------ the warm process
def serve(channel: socket.socket) -> None:
    """Fork what is asked for, until the keeper is gone."""
    for name in MODULES:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"an import has started {threads - 1} threads, which no fork would have")
    gc.freeze()  # a collection in a child would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets who ended: nobody asks for it here
    closed = select.poll()
    closed.register(channel, 0)  # POLLHUP alone
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 16, 4)
        if not data or closed.poll(0):  # who asked is gone: nobody would know of what it asked for
            return
        pid = os.fork()
        if not pid:
            channel.close()
            with open(fds[0], "rb", closefd=False) as file:
                _become(json.load(file), *fds[1:])
        for fd in fds:
            os.close(fd)
        channel.send(str(pid).encode())


def _become(request: dict[str, Any], out: int, err: int, told: int | None = None) -> None:
    """`orthogon WORDS` in this process, which ends with it."""

    def work() -> Any:
        forks.inside = True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["orthogon", *request["words"]]
        return importlib.import_module("launch.cli").main()

    code = 1
    try:
        code = children.exit_code(work)
    finally:
        with suppress(OSError):
            if told is not None:
                os.write(told, str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    # As a module of its name: what is forked asks `launch.warm`, not `__main__`, whether it is inside.
    importlib.import_module("launch.warm").serve(socket.socket(fileno=int(sys.argv[1])))
