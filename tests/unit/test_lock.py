"""One run folder, one writer: also when the owner dies, and where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import lock as locks
from trainer.lock import Lock
from trainer.outcome import Outcome, RunError

ROOT = Path(__file__).parents[2]
HOLD = """
import errno, fcntl, sys
from pathlib import Path
from trainer.lock import Lock
if sys.argv[2] == "no locks":
    def lockf(*_): raise OSError(errno.ENOLCK, "none")
    fcntl.lockf = lockf
lock = Lock.acquire(Path(sys.argv[1]), 7, 5)
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=["locks", "no locks"])
def how(request, monkeypatch) -> str:
    """With the kernel's locks, and without."""
    if request.param == "no locks":
        without_locks(monkeypatch, errno.ENOLCK)
    return request.param


def without_locks(monkeypatch, number: int) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    fcntl_call = fcntl.fcntl
    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    monkeypatch.setattr(
        locks.fcntl, "fcntl", lambda f, what, *a: lockf() if what == fcntl.F_GETLK else fcntl_call(f, what, *a)
    )


@pytest.fixture
def holder(tmp_path, how):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, holder) -> None:
    began = time.monotonic()
    with pytest.raises(RunError) as refused:
        Lock.acquire(tmp_path, 8, 0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert refused.value.outcome is Outcome.INFRASTRUCTURE
    assert f"pid {holder.pid} on host {locks.socket.gethostname()} since 20" in refused.value.what
    for _ in range(3):  # asking does not let go
        owner = Lock.owner(tmp_path)
        assert (owner["pid"], owner["attempt"]) == (holder.pid, 7)
    with pytest.raises(RunError):
        Lock.acquire(tmp_path, 8, 0)


def test_a_dead_owner_holds_nothing_and_is_named(tmp_path, holder) -> None:
    holder.kill()
    holder.wait()
    assert Lock.owner(tmp_path) is None
    lock = Lock.acquire(tmp_path, 8, 0)
    assert lock.left_behind.startswith(f"the lock of pid {holder.pid} on host ")
    assert lock.left_behind.endswith("was left behind")
    lock.release()


def test_a_zombie_holds_nothing(tmp_path, holder) -> None:
    holder.kill()
    time.sleep(0.3)  # dead, and nobody has waited for it
    Lock.acquire(tmp_path, 8, 1).release()


def test_released_is_free_and_leaves_nobody_behind(tmp_path, holder) -> None:
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    lock = Lock.acquire(tmp_path, 8, 0)
    assert lock.left_behind == ""
    lock.release()


def test_patience_outlasts_an_owner_that_ends(tmp_path, holder) -> None:
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({holder.pid}, 9)"])
    Lock.acquire(tmp_path, 8, 20).release()
    killer.wait()


def test_the_holder_itself_may_ask_and_is_not_let_in_twice(tmp_path, how) -> None:
    lock = Lock.acquire(tmp_path, 1, 0)
    assert Lock.owner(tmp_path)["pid"] == os.getpid()
    with pytest.raises(RunError, match=f"pid {os.getpid()} "):
        Lock.acquire(tmp_path, 2, 0)
    other = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from trainer.lock import Lock; print(Lock.owner(Path(sys.argv[1])))",
    ]
    told = subprocess.run([*other, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (f"'pid': {os.getpid()}" in told) == (
        how == "locks"
    )  # the other process has the kernel's locks, and none is held
    lock.release()
    lock.release()
    assert Lock.owner(tmp_path) is None
    Lock.acquire(tmp_path, 2, 0).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_another_host_is_alive_while_it_touches(tmp_path, monkeypatch, number) -> None:
    without_locks(monkeypatch, number)
    record = {"host": "elsewhere", "pid": 1, "started": 1, "attempt": 3, "time": 1.0}
    (tmp_path / "lock").write_bytes(locks._line(record))
    with pytest.raises(RunError, match="pid 1 on host elsewhere"):
        Lock.acquire(tmp_path, 4, 0)
    assert Lock.owner(tmp_path) == record
    os.utime(tmp_path / "lock", (1, time.time() - 121))
    assert Lock.owner(tmp_path) is None
    lock = Lock.acquire(tmp_path, 4, 0)
    assert "host elsewhere" in lock.left_behind
    os.utime(tmp_path / "lock", (1, 1))
    lock.touch()
    assert time.time() - (tmp_path / "lock").stat().st_mtime < 60
    lock.release()
    assert not list(tmp_path.glob(".*"))


def test_without_locks_a_pid_that_is_someone_else_now_is_dead(tmp_path, monkeypatch) -> None:
    without_locks(monkeypatch, errno.ENOLCK)
    record = {"host": locks.socket.gethostname(), "pid": os.getpid(), "started": 5, "attempt": 3, "time": 1.0}
    (tmp_path / "lock").write_bytes(locks._line(record))
    assert "was left behind" in Lock.acquire(tmp_path, 4, 0).left_behind
    locks.Lock._held.clear()


def test_a_torn_record_and_a_folder_that_is_not_there(tmp_path) -> None:
    (tmp_path / "lock").write_text('{"host": "x", "pi')
    assert Lock.owner(tmp_path) is None
    Lock.acquire(tmp_path, 1, 0).release()
    with pytest.raises(RunError, match="cannot be locked: No such file"):
        Lock.acquire(tmp_path / "none", 1, 0)


TURN = """
import pathlib, sys, time
from trainer.lock import turn
with turn(pathlib.Path(sys.argv[1]), "a cake", print):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_turns_are_taken_one_at_a_time_and_who_waits_says_for_whom(tmp_path) -> None:
    file, said, looks = tmp_path / "new/lock", [], []
    first = subprocess.Popen([sys.executable, "-c", TURN, str(file), "2"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    assert first.stdout.readline() == "mine\n"
    with locks.turn(file, "a cake", said.append, lambda: looks.append(first.poll())):
        assert first.wait(timeout=10) == 0
    assert said == [f"waiting for pid {first.pid} on host {socket.gethostname()}, which makes a cake"]
    assert len(looks) > 2
    second = subprocess.Popen(
        [sys.executable, "-c", TURN, str(file), "60"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert second.stdout is not None
    assert second.stdout.readline() == "mine\n"

    def asked() -> None:
        raise RunError("SIGTERM came")

    try:
        with pytest.raises(RunError, match="SIGTERM came"), locks.turn(file, "a cake", said.append, asked):
            pytest.fail("two at once")
    finally:
        second.kill()
        second.wait()
    with locks.turn(file, "a cake", lambda text: pytest.fail(text)):  # nobody's any more
        pass
