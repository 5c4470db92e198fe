"""Which nodes a job has, and where its ranks meet: one function that every way of starting ranks uses."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

from launch.slurm import query

LOWEST, PORTS = 20000, 12000
"""Ports below those that Linux gives to outgoing connections (32768 on)."""


def rendezvous(nodelist: str, job: int, start: int, free: Callable[[int], bool] | None = None) -> tuple[str, int]:
    """The host and port where the ranks of one attempt meet.

    The host is the allocation's first, by the name that Slurm gives it: where the batch script runs, and rank 0. Not
    localhost, which is another machine on every node, nor SLURM_LAUNCH_NODE_IPADDR, which is where srun was called. The port
    follows from job and start, so that two jobs on one node, and an attempt beside the remains of the one before, differ.

    Args:
        nodelist: as in SLURM_JOB_NODELIST.
        job: the job's number; in an array each member has its own.
        start: how many attempts the job has made before.
        free: whether a port is free on that host; the next ones are tried. None: not looked at.
    """
    first = hosts(nodelist)[0]
    port = LOWEST + (job * 31 + start) % PORTS
    for offset in range(PORTS):
        candidate = LOWEST + (port - LOWEST + offset) % PORTS
        if free is None or free(candidate):
            return first, candidate
    return first, port


def free(port: int) -> bool:
    """Whether a port can be listened on here."""
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False


def hosts(nodelist: str) -> list[str]:
    """The names of a list of nodes, in order: as scontrol expands it, else as `expand` does."""
    names = query.hostnames(nodelist)
    return names or expand(nodelist)


def expand(nodelist: str) -> list[str]:
    """A list such as `n[1-3,07],gpu4` in single names: ranges keep their leading zeros.

    Raises:
        ValueError: it is no such list.
    """
    found: list[str] = []
    for part in split(nodelist):
        match = re.fullmatch(r"([^\[\],]*)\[([^\[\]]+)\]([^,]*)", part)
        if match is None:
            if not part or set(part) & set("[]"):
                raise ValueError(f"'{nodelist}' is no list of nodes")
            found.append(part)
            continue
        for span in match[2].split(","):
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
            if ends is None:
                raise ValueError(f"'{nodelist}' is no list of nodes")
            first, last = ends[1], ends[2] or ends[1]
            numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
            found += [
                f"{match[1]}{number}{rest}" for number in numbers for rest in (expand(match[3]) if match[3] else [""])
            ]
    return found


def split(nodelist: str) -> list[str]:
    """A list at its commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", nodelist)
