"""Processes of an attempt: none outlives its launcher, and none is left when an attempt has ended.

Whatever is below this process counts as the attempt's: a launcher starts nothing else meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAVE_SECONDS = 5.0
"""What processes get to leave by themselves after SIGTERM, or after their parent died."""
UNKILLABLE_SECONDS = 30.0
_PDEATHSIG, _SUBREAPER = 1, 36  # prctl(2)


class Child(Protocol):
    """What launchers use of a child: a `subprocess.Popen`, or a fork."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...


class Asked:
    """Whether a signal has asked this process for an end; installed for the time of a `with`."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Asked:
        self._before = {number: signal.signal(number, self._note) for number in FORWARDED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number


def start(line: list[str], log: IO[str], environment: Mapping[str, str]) -> subprocess.Popen[Any]:
    """Start a child in a session of its own, so that a terminal's Ctrl-C reaches it once, from here.

    On Linux it gets SIGTERM if this process dies, even by SIGKILL, and what it leaves behind becomes a child of this
    process, which can find and end it. Elsewhere only the child's own process group can be ended.
    """
    prepare = _bound_to_this() if sys.platform == "linux" else None
    return subprocess.Popen(line, stderr=log, env=dict(environment), start_new_session=True, preexec_fn=prepare)


class Forked:
    """A child that is a fork of this process and does `work`, which returns its exit code: as bound to it as by `start`.

    No signal is lost between the fork and `handlers`, which takes them over in the child.
    """

    def __init__(
        self,
        work: Callable[[], int],
        log: IO[Any] | None,
        environment: Mapping[str, str],
        handlers: Callable[[], object],
    ) -> None:
        prepare = _bound_to_this()

        def begin() -> int:
            os.setsid()
            prepare()
            handlers()
            if log is not None:
                os.dup2(log.fileno(), 2)
            os.environ.clear()
            os.environ.update(environment)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            return work()

        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            self.pid = os.fork()
            if not self.pid:
                code = 1
                try:
                    code = exit_code(begin)
                finally:  # nothing may go on from here as if it were the parent
                    os._exit(code)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # a signal handler asks while the line above has the answer
                return self.returncode
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0)
            time.sleep(0.01)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def default_signals() -> None:
    """The signals that a launcher takes over, as a new process has them."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(work: Callable[[], Any]) -> int:
    """Do what a program does, and tell the exit code that the interpreter would end with; all output is out."""
    try:
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return int(code)


def _bound_to_this() -> Callable[[], None]:
    """What a child of this process does first: get SIGTERM if this process dies. This one adopts what the child leaves."""
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)

    def prepare() -> None:
        libc.prctl(_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def end(child: Child, grace: float = LEAVE_SECONDS) -> None:
    """End a child and all below it: SIGTERM, and after a grace SIGKILL."""
    if child.poll() is None:
        child.terminate()
    _wait(child, grace)
    sweep(child, 0.0)


def sweep(child: Child, grace: float = LEAVE_SECONDS) -> None:
    """End what a child left behind, after a grace to leave by itself (ranks notice that their torchrun is gone)."""
    deadline = time.monotonic() + grace
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        _reap(left, child)
        time.sleep(0.05)
    complain = time.monotonic() + UNKILLABLE_SECONDS
    while True:
        for pid in left:
            _kill(pid)
        if child.poll() is None:
            _kill(child.pid, group=True)
        _wait(child, 1.0)
        _reap(left, child)
        left = descendants(os.getpid())
        if not left and child.poll() is not None:
            return
        if time.monotonic() > complain:  # a disk or a device does not answer: the next attempt must wait
            print(
                f"waiting for processes that SIGKILL does not end: {left or [child.pid]}", file=sys.stderr, flush=True
            )
            complain = float("inf")


def descendants(pid: int) -> list[int]:
    """All processes below one, its children first; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _reap(pids: list[int], child: Child) -> None:
    """Take the exit status of adopted processes; the child's own is for `Popen`."""
    child.poll()
    for pid in pids:
        if pid != child.pid:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def _kill(pid: int, *, group: bool = False) -> None:
    try:
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _wait(child: Child, seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return
