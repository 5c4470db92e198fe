"""What the supervisors of several nodes know of each other: signs of life and plans, as files in the shared run folder.

`nodes/HOST.json` is a supervisor's sign of life, written every second; others believe in it as long as it changes by their
own clock, so that clocks need not agree. The first living host of the list leads. For an attempt it opens a port for a
short while; who connects has proven that it reaches the leader, which a file on a shared file system does not, and becomes a
member. The leader is the first of them and hosts the rendezvous. Offer and plan stand in the leader's sign: a network file
system may hide a new file for a minute, but not the new content of an old one.
"""

from __future__ import annotations

import fcntl
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch import evidence
from trainer.files import write_json

STALE_SECONDS = 10.0
"""A sign of life that has not changed for so long is none."""
WINDOW_SECONDS = 15.0
"""How long the leader waits for a living host that does not reach it."""
BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Sign:
    """A supervisor's sign of life."""

    host: str
    started: float
    count: int = 0
    running: int = 0
    """The attempt whose torchrun runs here; 0 for none."""
    done: int = 0
    """The last attempt that has ended here."""
    ended: str = ""
    """Why this supervisor ended it, or empty."""
    asked: bool = False
    """A signal asked this supervisor for the end of the run."""
    offer: dict[str, Any] | None = None
    """Of a leader: where to connect for which attempt."""
    plan: dict[str, Any] | None = None
    """Of a leader: the last plan."""


@dataclass(frozen=True)
class Plan:
    """Who runs an attempt, and where they meet."""

    attempt: int
    id: str
    members: list[str]
    address: str
    port: int
    time: float = 0.0
    """When it was made, wall time of the leader."""
    unreached: list[str] = field(default_factory=list)
    """Hosts that live, as their files tell, and did not reach the leader."""

    def torchrun(self, host: str) -> tuple[str, ...]:
        """The options of torchrun on a member.

        The static rendezvous: with the other one, an agent that does not host it can outlive the one that does, or wait
        for it, for minutes.
        """
        return (
            f"--nnodes={len(self.members)}", f"--node-rank={self.members.index(host)}", f"--rdzv-id={self.id}",
            f"--master-addr={self.address}", f"--master-port={self.port}",
        )  # fmt: skip


class Nodes:
    """The signs of life in `nodes/`: this host's is kept fresh by `beat`, which every loop calls; others' are watched."""

    def __init__(self, folder: Path, hosts: Sequence[str], host: str) -> None:
        self.folder, self.hosts = folder / "nodes", list(hosts)
        self.mine = Sign(host, time.time())
        self.signs: dict[str, Sign] = {}
        self._changed: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._began, self._written = time.monotonic(), -BEAT_SECONDS
        self.folder.mkdir(exist_ok=True)

    def beat(self, **changes: Any) -> None:
        """Write this host's sign if a second has passed or something changed, and read the others'."""
        now = time.monotonic()
        if not changes and now - self._written < BEAT_SECONDS:
            return
        self._written = now
        self.mine = replace(self.mine, count=self.mine.count + 1, **changes)
        write_json(self.folder / f"{self.mine.host}.json", asdict(self.mine))
        self.signs[self.mine.host], self._changed[self.mine.host] = self.mine, now
        for host in self.hosts:
            found = evidence.record(self.folder / f"{host}.json") if host != self.mine.host else None
            if found is None:
                continue
            sign = Sign(**found)
            mark = (sign.started, sign.count)
            if mark != self._first.setdefault(host, mark) and sign != self.signs.get(host):
                self._changed[host], self.signs[host] = now, sign  # an old file that stays as it is tells of no life

    def living(self) -> list[str]:
        """The hosts that live, in the order of the list."""
        now = time.monotonic()
        return [host for host in self.hosts if now - self._changed.get(host, -STALE_SECONDS) < STALE_SECONDS]

    def leads(self) -> bool:
        """Whether this host leads: it is the first that lives, and has looked long enough to know."""
        knows = self.hosts[0] == self.mine.host or time.monotonic() - self._began >= STALE_SECONDS
        return knows and self.living()[:1] == [self.mine.host]

    def offered(self, above: int) -> dict[str, Any] | None:
        """An offer for an attempt above a number that stands open."""
        offers = [self.signs[host].offer for host in self.living() if host in self.signs]
        return next((one for one in offers if one is not None and one["attempt"] > above), None)

    def plan(self) -> Plan | None:
        """The newest plan that any host, dead ones included, has told of."""
        plans = [Plan(**sign.plan) for sign in self.signs.values() if sign.plan is not None]
        return max(plans, key=lambda plan: plan.attempt, default=None)

    def leave(self) -> None:
        """Take this host's sign away."""
        (self.folder / f"{self.mine.host}.json").unlink(missing_ok=True)


def offer(nodes: Nodes, logs: Path, address: str, bind: str, stop: Callable[[], bool]) -> Plan | None:
    """Let the other living hosts prove that they reach this one, and write the plan; None if `stop` says so meanwhile.

    Args:
        address: how others reach this host.
        bind: the address of the interface to listen on; empty for all.
    """
    identity = secrets.token_hex(8)
    joined = {nodes.mine.host}
    with socket.create_server((bind, 0)) as door:
        door.settimeout(0.2)
        here = {"attempt": int(logs.name), "id": identity, "address": address, "port": door.getsockname()[1]}
        nodes.beat(offer=here)
        until = time.monotonic() + WINDOW_SECONDS
        while not joined >= set(nodes.living()) and time.monotonic() < until:
            nodes.beat()
            if stop():
                nodes.beat(offer=None)
                return None
            host = _admit(door, identity)
            if host in nodes.hosts:
                joined.add(host)
    with socket.create_server((bind, 0)) as free:
        port = free.getsockname()[1]
    members = [host for host in nodes.hosts if host in joined]
    unreached = [host for host in nodes.living() if host not in joined]
    plan = Plan(int(logs.name), identity, members, address, port, time.time(), unreached)
    write_json(logs / "plan.json", asdict(plan))
    nodes.beat(offer=None, plan=asdict(plan))
    return plan


def _admit(door: socket.socket, identity: str) -> str:
    """The host that asks to be let in; empty if none does."""
    try:
        guest, _ = door.accept()
        with guest:
            guest.settimeout(1.0)
            words = guest.recv(4096).decode(errors="replace").split()
            if len(words) == 2 and words[0] == identity:
                guest.sendall(b"in\n")
                return words[1]
    except OSError:  # nobody came, or it did not speak
        pass
    return ""


def join(offered: Mapping[str, Any], host: str) -> bool:
    """Ask a leader to be let in; False if it cannot be reached, or the offer stands no more."""
    try:
        with socket.create_connection((offered["address"], offered["port"]), timeout=2.0) as door:
            door.sendall(f"{offered['id']} {host}".encode())
            return door.recv(16) == b"in\n"
    except OSError:
        return False


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, on Linux: gloo would else take the one that the hostname means."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(handle, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
