"""Process group, device, and decisions that all ranks take together."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer import lock
from trainer.config import ResourcesConfig
from trainer.outcome import Outcome, RunError

T = TypeVar("T")


def start(resources: ResourcesConfig) -> torch.device:
    """Join the process group that torchrun describes (or be alone) and return this rank's device."""
    torch.set_num_threads(resources.threads_per_rank)
    # Softmax tails and old moments sink below 1e-38; a CPU multiplies such numbers many times slower than zeros.
    torch.set_flush_denormal(True)
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "resources.device is cuda and there is no CUDA device", where="resources.device", mend="use auto"
        )
    use_cuda = torch.cuda.is_available() and resources.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():  # inside a program that has its own ranks
        return device
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    patience = timedelta(minutes=30)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_peers(error: Exception) -> bool:
    """Whether an error of a collective says no more than that another rank, or the way to it, is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|Connection (closed|reset)|[Tt]imed? ?out", text) is not None
    )


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def on_rank_zero(work: Callable[[], T], patience: timedelta | None = None, group: dist.ProcessGroup | None = None) -> T:
    """Do `work` on rank 0 while the others wait; all get its result, or raise its error.

    The others wait as long as the process group does, or for `patience`, which needs a group of its own.
    """
    waiting = dist.new_group(timeout=patience, backend="gloo") if patience and world() > 1 else None
    answer: list[tuple[T | None, RunError | None]] = [(None, None)]
    if rank() == 0:
        try:
            answer = [(work(), None)]
        except (RunError, OSError) as error:
            answer = [(None, _as_sentence(error))]
    dist.broadcast_object_list(answer, src=0, group=waiting or group)
    if waiting is not None:
        dist.destroy_process_group(waiting)
    result, error = answer[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def turn(file: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Only these ranks make `what`; another process, maybe one that an interrupted command left, is waited for (`lock.turn`).

    Raises:
        RunError: on all ranks alike: the lock cannot be made.
    """
    with ExitStack() as held:
        on_rank_zero(lambda: held.enter_context(lock.turn(file, what, say)), timedelta(days=7))
        yield


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do `work` on every rank; if any of them fails with a sentence or an OSError, all raise the first of these."""
    result, mine = None, None
    try:
        result = work()
    except (RunError, OSError) as error:
        mine = _as_sentence(error)
    errors: list[RunError | None] = [None] * world()
    dist.all_gather_object(errors, mine, group=group)
    for error in errors:
        if error is not None:
            raise error
    return result  # type: ignore[return-value]


def from_all(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do `work` on every rank; all get the results of all ranks, or raise the first error, as in `together`."""
    answer: tuple[T | None, RunError | None] = (None, None)
    try:
        answer = (work(), None)
    except (RunError, OSError) as error:
        answer = (None, _as_sentence(error))
    answers: list[tuple[T | None, RunError | None]] = [answer] * world()
    dist.all_gather_object(answers, answer, group=group)
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]  # type: ignore[misc]


def _as_sentence(error: RunError | OSError) -> RunError:
    """An error that can travel to the other ranks; what the system reports ends a run by its number."""
    if isinstance(error, RunError):
        return error
    where = f"rank {rank()}" + (f", {error.filename}" if error.filename else "")
    return RunError(
        str(error), where=where, mend=f"see the log of rank {rank()}", outcome=Outcome.of_errno(error.errno)
    )


def digest(facts: Mapping[str, object]) -> float:
    """A whole number below 2^16 that differs where facts do, but for one case in 65,536."""
    return float(int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:2], "big"))


def same(facts: Mapping[str, object], what: str, outcome: Outcome = Outcome.BAD_CONFIGURATION) -> None:
    """Raise on all ranks, naming the first fact that differs and who has what, unless all ranks have the same facts.

    Every rank gets the facts of every other: for the start, and for ranks that know already that they disagree.
    """
    found: list[Mapping[str, object]] = [{}] * world()
    dist.all_gather_object(found, dict(facts))
    for key in found[0] | {key: None for other in found for key in other}:
        values = [repr(one.get(key)) for one in found]
        odd = next((number for number, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise RunError(
                f"the ranks disagree about {what}: {key} is {values[0][:100]} on rank 0 and {values[odd][:100]} on rank {odd}",
                where=key,
                mend="start all ranks from the same run folder, with the same code and packages",
                outcome=outcome,
            )


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums of a few float64 numbers over all ranks; a NaN on any rank is a NaN on all."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return list(tensor.tolist())
