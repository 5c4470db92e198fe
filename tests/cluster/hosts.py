"""Emulated hosts: each has a name, a network, processes and mounts of its own, all in namespaces that vanish with it.

Hosts hang on one bridge, which lies in the namespace of the first, `head`; there is no way out, and no interface of this
machine is touched. The first process of a host starts the commands that come in by a FIFO and reaps what is left to it;
killing it is a power cut. Only processes that are recorded here, by number and time of start, are ever signalled.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cluster.packages import PATH

NET = "10.77.0"
"""Inside the namespaces only."""
HEAD = f"{NET}.254"
FIRST_PROCESS = Path(__file__).with_name("first_process.py")


def wait_for(what: Callable[[], object], seconds: float, name: str) -> None:
    """Wait for something that can be seen."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name}: not within {seconds:g} s")
        time.sleep(0.05)


class Hosts:
    """The hosts `head`, `n1`, `n2` ..., with their files in one folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self.run, self.log = folder / "run", folder / "log"
        for path in (self.run, self.log):
            path.mkdir(parents=True)
        self.hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", f"{HEAD} head"]
        lines += [f"{address(name)} {name}" for name in self.names]
        self.hosts_file.write_text("\n".join(lines) + "\n")
        self._first: dict[str, tuple[int, int]] = {}
        self._parents: dict[str, subprocess.Popen[bytes]] = {}

    def power_on(self, name: str) -> None:
        """Make a host and plug it in."""
        for left in self.run.glob(f"{name}.*"):
            left.unlink()
        self.munge(name).mkdir(mode=0o755, exist_ok=True)
        os.mkfifo(self.run / f"{name}.fifo", 0o600)
        with open(self.log / f"{name}.out", "ab") as out:
            parent = subprocess.Popen(
                [
                    "unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
                    sys.executable, "-ISs", str(FIRST_PROCESS), name, str(self.run), str(self.munge(name)),
                    str(self.munge("head")), str(self.hosts_file),
                ],
                env=plain(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/",
                preexec_fn=die_with_parent,
            )  # fmt: skip
        wait_for((self.run / f"{name}.ready").exists, 20, f"{name}, see {self.log}")
        first = below(parent.pid)[0]
        self._parents[name], self._first[name] = parent, (first, started(first) or 0)
        self._plug_in(name)
        spaces = {os.readlink(f"/proc/{pid}/ns/net") for one in self._first if (pid := self.first(one))}
        (self.run / "netns").write_text("".join(f"{space}\n" for space in sorted(spaces)))

    def power_off(self, name: str) -> None:
        """A power cut: every process of the host dies at once."""
        first = self.first(name)
        if first is not None:
            os.kill(first, signal.SIGKILL)
            self._parents[name].wait(20)

    def first(self, name: str) -> int | None:
        """The first process of a host that is on."""
        pid, since = self._first.get(name, (0, 0))
        return pid if pid and started(pid) == since else None

    def start(self, name: str, service: str, line: list[str], environment: Mapping[str, str], before: str = "") -> int:
        """Start a daemon on a host; returns its process.

        Args:
            before: shell lines that run before it.
        """
        script, first = self.run / f"{name}.{service}.sh", self.first(name)
        assert first is not None, f"{name} is off"
        words = " ".join(shlex.quote(f"{key}={value}") for key, value in environment.items())
        out = shlex.quote(str(self.log / f"{name}.{service}.out"))
        script.write_text(f"{before}exec env -i {words} {shlex.join(line)} </dev/null >>{out} 2>&1\n")
        known = set(below(first))
        (self.run / f"{name}.fifo").write_text(f"{script}\n")

        def there() -> list[int]:
            return [pid for pid in below(first) if pid not in known and program_of(pid) == Path(line[0]).resolve().name]

        wait_for(there, 60, f"{service} on {name}, see {out}")
        return there()[0]

    def inside(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a host's network."""
        return subprocess.run(
            ["nsenter", f"--net=/proc/{self.first(name)}/ns/net", "--", *words], env=plain(), capture_output=True,
            text=True, timeout=30, check=False,
        )  # fmt: skip

    def cable(self, name: str, *, plugged: bool) -> None:
        """Pull a host's cable, or plug it in again."""
        self._ip("head", "link", "set", f"to-{name}", "up" if plugged else "down")

    def munge(self, name: str) -> Path:
        """The folder of a host's munge socket, which the host sees at the place of the head's."""
        return self.run / ("munge" if name == "head" else f"munge.{name}")

    def _plug_in(self, name: str) -> None:
        if name == "head":
            self._ip("head", "link", "add", "br0", "type", "bridge")
            self._ip("head", "addr", "add", f"{HEAD}/24", "dev", "br0")
            self._ip("head", "link", "set", "br0", "up")
            return
        self.inside("head", "ip", "link", "del", f"to-{name}")  # of a host that was switched off
        first = str(self.first(name))
        self._ip("head", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", first)
        self._ip("head", "link", "set", f"to-{name}", "master", "br0", "up")
        self._ip(name, "addr", "add", f"{address(name)}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")

    def _ip(self, where: str, *words: str) -> None:
        answer = self.inside(where, "ip", *words)
        assert answer.returncode == 0, (words, answer.stderr)


def address(name: str) -> str:
    return HEAD if name == "head" else f"{NET}.{name.removeprefix('n')}"


def plain(**more: str) -> dict[str, str]:
    """The environment of daemons: nothing of the caller's."""
    return {"PATH": PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/root")} | more


def die_with_parent() -> None:
    """In a child, before its program: if this process dies, even by SIGKILL, the host is switched off."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if it is gone or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def below(pid: int) -> list[int]:
    """The children of a process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
        except (OSError, IndexError):
            continue
    return found


def program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").resolve().name
    except OSError:
        return ""
