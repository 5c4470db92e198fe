"""Emulated nodes: each has a network, a host name and processes of its own; a cable between two of them can be cut.

Everything lies in namespaces that are made here and vanish with their processes; no interface of this machine is used.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
ADDRESSES = {"n1": "10.213.0.1", "n2": "10.213.0.2"}


def reason_not_to() -> str | None:
    """Why nodes cannot be emulated here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    try:
        with Pair():
            return None
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces are not allowed: {detail}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


class Pair:
    """Two nodes, n1 and n2, with a cable between them; a context manager that ends what runs on them."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(3)
        self.running: dict[str, subprocess.Popen[Any]] = {}
        self._made: list[str] = []

    def __enter__(self) -> Pair:
        try:
            for name in ADDRESSES:
                ip("netns", "add", self.space(name))
                self._made.append(self.space(name))
                ip("-n", self.space(name), "link", "set", "lo", "up")
            ip(
                "-n", self.space("n1"), "link", "add", "cable0", "type", "veth",
                "peer", "name", "cable0", "netns", self.space("n2"),
            )  # fmt: skip
            for name, address in ADDRESSES.items():
                ip("-n", self.space(name), "addr", "add", f"{address}/24", "dev", "cable0")
                ip("-n", self.space(name), "link", "set", "cable0", "up")
            subprocess.run(
                [*self._inside("n1"), "sh", "-c", "ping -c 1 -W 5 10.213.0.2 >/dev/null 2>&1 || true; hostname"],
                check=True, capture_output=True, timeout=30,
            )  # fmt: skip
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self.running:
            self.kill(name)
        for space in self._made:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True, timeout=20)

    def space(self, name: str) -> str:
        return f"orthogon-{self.id}-{name}"

    def _inside(self, name: str) -> list[str]:
        return [
            "ip", "netns", "exec", self.space(name),
            "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "--",
            "sh", "-c", f'hostname {name}; exec "$@"', "sh",
        ]  # fmt: skip

    def start(self, name: str, log: Path, *command: str) -> subprocess.Popen[Any]:
        """Start a command as the first process of a node; what it prints goes into `log`."""
        with open(log, "w", encoding="utf-8") as file:
            self.running[name] = subprocess.Popen(
                [*self._inside(name), *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        return self.running[name]

    def processes(self, name: str) -> dict[int, list[str]]:
        """The processes on a node by their process ids outside of it, with their command lines."""
        space, found = os.stat(f"/run/netns/{self.space(name)}"), {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                net = os.stat(entry / "ns/net")
                if (net.st_dev, net.st_ino) == (space.st_dev, space.st_ino):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
        return found

    def kill_agent(self, name: str) -> None:
        """SIGKILL to torchrun on a node."""
        pids = [pid for pid, words in self.processes(name).items() if "torch.distributed.run" in words]
        assert len(pids) == 1, pids
        os.kill(pids[0], signal.SIGKILL)

    def kill(self, name: str) -> None:
        """A power cut: every process of a node dies at once."""
        process = self.running[name]
        if process.poll() is None:
            process.kill()
        process.wait(30)

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.space("n2"), "link", "set", "cable0", "down")
