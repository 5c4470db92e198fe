"""The verb node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from launch import process
from launch.retry import RESTARTS
from launch.verbs.options import Restarts, RunName, Runs
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Node:
    """Serve a run on this node, together with other nodes that share its folder.

    A cluster's launcher starts it once on every node, with the same list of hosts. The nodes find each other through the
    run folder; a node that is lost or not reached is left out of the next attempt. Make the run with
    `orthogon run CONFIG --make-only`.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    hosts: Annotated[str, arg(metavar="n1,n2,...")]
    """All hosts; the first that lives leads."""
    host: Annotated[str, arg(metavar="n1")]
    """Which of them this is."""
    address_of: Annotated[tuple[str, ...], arg(metavar="HOST=ADDRESS ...")] = ()
    """How hosts are reached, where their names are not enough."""
    restarts: Restarts = RESTARTS
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.cluster import supervise
        from launch.verbs.runs import told

        hosts = list(filter(None, self.hosts.split(",")))
        addresses = dict(pair.partition("=")[::2] for pair in self.address_of)
        for name in (self.host, *addresses):
            if name not in hosts:
                raise RunError(f"{name} is none of the hosts", where="command line", mend=f"--hosts names {self.hosts}")
        if len(set(hosts)) < len(hosts) or any("/" in host for host in hosts):
            raise RunError(f"'{self.hosts}' is no list of hosts", where="command line, --hosts", mend="e.g. n1,n2")
        folder, config = process.opened(self.run, self.runs)
        record, led = supervise(config, folder, hosts, self.host, addresses, self.restarts)
        if led:
            return told(config, folder, record)
        print(f"{record['outcome']}: {record['message']}", flush=True)
        return int(record["exit_code"])
