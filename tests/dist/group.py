"""Warm gloo ranks for tests: one group of processes per world size, kept for the whole session."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class RankFailed(AssertionError):
    """A rank raised; the text is its traceback."""


class Group:
    """`world` processes that run functions together over torch.distributed."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        """The return values of all ranks; the first failure, or the end of patience, raises."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout)
            if not ready:
                raise RankFailed(f"ranks {[r for r in range(len(self.pipes)) if r not in results]} hang: {timeout} s passed")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankFailed(f"rank {rank} died") from None
                if not good:
                    raise RankFailed(f"rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class Groups:
    """The groups of a session, by world size; a group with a failed rank is replaced."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 90.0) -> list[Any]:
        if world not in self.groups:
            self.groups[world] = Group(world)
        try:
            return self.groups[world].run(function, arguments, timeout)
        except BaseException:
            self.groups.pop(world).kill()
            raise

    def close(self) -> None:
        for group in self.groups.values():
            group.kill()


def _serve(pipe: Connection, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        linear = torch.nn.functional.linear
        try:
            result = function(*arguments)
            assert torch.nn.functional.linear is linear, "torch.nn.functional.linear is another than before"
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
