"""Saves and loads that go wrong on purpose. Imported by spawned processes."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.dist.bodies import sharded
from trainer.checkpoint import load as loading
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.background import Background
from trainer.checkpoint.load import load, newest_verified
from trainer.checkpoint.save import all_finite, save
from trainer.guard import faults
from trainer.outcome import RunError

ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
EVERY_RANK = ("save.begin", "save.write", "save.after_shard", "save.hash")
RANK_ZERO = ("save.before_manifest", "save.after_manifest", "save.rename", "save.renamed")


def tensors_of(step: float, rows: int = 7) -> dict[str, torch.Tensor]:
    """Uneven and empty shards, two dtypes, a replicated tensor; other values at each step."""
    return {
        "model.weight": sharded(torch.arange(rows * 5.0).view(rows, 5) + 100 * step),
        "model.one_row": sharded(torch.full((1, 3), step, dtype=torch.bfloat16)),
        "optim.whole": torch.full((3, 3), step),
        "optim.step": torch.tensor(float(step)),
    }


def facts_of(step: int, **state: Any) -> dict[str, Any]:
    return {"config": {"step": step}, "state": state, "lineage": {}, "attempt": 1}


def save_step(folder: str, step: int, rows: int = 7, **state: Any) -> str:
    return save(Path(folder), step, step, tensors_of(step, rows), **facts_of(step, **state)).name


def save_good(folder: str, step: int) -> str:
    return save_step(folder, step, good=True)


def holds(folder: Path, step: float) -> bool:
    """Whether the generation has the values of `step`."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    load(folder, manifests.read(folder), tensors)
    wanted = tensors_of(step)
    return all(torch.equal(local(tensors[name]), local(wanted[name])) for name in wanted)


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def strike(text: str) -> None:
    """Ask for faults from here on; the rank is told."""
    faults.locate(rank=dist.get_rank())
    faults._faults[:] = faults.parse(text)


def attempted(work: Any) -> tuple[str, str, str]:
    """Outcome, sentence and place of the RunError that `work` raises."""
    try:
        work()
    except RunError as error:
        return error.outcome.value, error.what, error.where
    finally:
        strike("")
    return "no error", "", ""


def names(folder: Path) -> list[str]:
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found


def every_fault_of_a_save(text: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Each point, errno and rank: what was raised. The generation before stays and loads, the same step is saved next."""
    folder, seen = Path(text), []
    save_step(text, 1)
    cases = [(point, rank) for point in EVERY_RANK for rank in range(dist.get_world_size())]
    for point, rank in [*cases, *((point, 0) for point in RANK_ZERO)]:
        for number in ERRNOS:
            fault = f"{number}@{point} rank={rank}"
            strike(fault)
            seen.append((fault, attempted(lambda: save_step(text, 2))))
            assert names(folder) == ["step-00000001"], fault
            newest = newest_verified(folder)
            assert newest is not None
            assert newest[0].name == "step-00000001", fault
            assert save_step(text, 2) == "step-00000002", fault
            dist.barrier()
            if dist.get_rank() == 0:
                manifests.verify(folder / "step-00000002")
                manifests.remove(folder / "step-00000002")
            dist.barrier()
    assert holds(folder / "step-00000001", 1)
    return seen


def faults_of_a_load(text: str) -> list[tuple[str, tuple[str, str, str]]]:
    save_step(text, 1)
    seen = []
    for point in ("load.verified", "load.read"):
        for rank in range(dist.get_world_size()):
            fault = f"EIO@{point} rank={rank}"
            strike(fault)
            seen.append((fault, attempted(lambda: (newest_verified(Path(text)), holds(Path(text) / "step-00000001", 1)))))
    assert newest_verified(Path(text)) is not None
    assert holds(Path(text) / "step-00000001", 1)
    return seen


def save_beyond_limit(text: str, limit: int) -> tuple[str, str, str]:
    """The last rank may write files of at most `limit` bytes."""
    save_step(text, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        found = attempted(lambda: save_step(text, 2, rows=40_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(Path(text)) == ["step-00000001"]
    save_step(text, 2)
    return found


def save_on_small_disk(text: str) -> tuple[tuple[str, str, str], list[str]]:
    """More than fits, in the foreground and in the background; then less."""
    save_step(text, 1)
    found = attempted(lambda: save_step(text, 2, rows=200_000))
    background = Background()
    background.start(Path(text), 2, 2, tensors_of(2, 200_000), **facts_of(2))
    assert attempted(background.finish) == found
    save_step(text, 2)
    assert holds(Path(text) / "step-00000001", 1)
    return found, names(Path(text))


def choose(text: str, good: bool = False) -> str | None:
    found = newest_verified(Path(text), good=good)
    return found[0].name if found else None


def choose_where_nothing_moves(text: str) -> tuple[str | None, str | None, int]:
    """Twice the newest verified, where rename is refused; how many generations the second call looked at."""

    def refused(folder: Path, reason: str) -> Path:
        raise PermissionError(13, "Permission denied")

    with mock.patch.object(manifests, "quarantine", refused):
        first = choose(text)
    with mock.patch.object(loading, "_examine", wraps=loading._examine) as examined:
        return first, choose(text), examined.call_count


def choose_as_nobody(text: str) -> str | None:
    """Without the rights of the owner of the files."""
    os.seteuid(65534)
    try:
        return choose(text)
    finally:
        os.seteuid(0)


def finite_with_poison(value: float) -> bool:
    """Only the last rank's shard holds it."""
    tensors = tensors_of(1)
    if dist.get_rank() == dist.get_world_size() - 1:
        local(tensors["model.weight"])[-1, -1] = value
    return all_finite(tensors)


def save_in_background(text: str) -> list[str]:
    """Weights change right after `start`, the ranks talk meanwhile, and a second save begins while the first is written."""
    folder, background = Path(text), Background()
    assert background.finish() is None
    for step in (1, 2):
        strike(f"sleep=0.4@save.background rank={step - 1}")
        live = tensors_of(step)
        background.start(folder, step, step, live, **facts_of(step))
        for tensor in live.values():
            local(tensor).fill_(-1)
        assert background.writing == f"step-{step:08d}.tmp-1"
        if dist.get_rank() == step - 1:
            assert not background.done
        assert (folder / "step-00000001").exists() == (step == 2)  # the second start waited for the first
        counted = torch.ones(3)
        dist.all_reduce(counted)
        assert counted.tolist() == [dist.get_world_size()] * 3
    finished = background.finish()
    assert finished is not None
    assert finished.name == "step-00000002"
    assert background.done
    assert background.finish() is None
    strike("")
    assert holds(folder / "step-00000001", 1)
    assert holds(folder / "step-00000002", 2)
    return names(folder)


def fail_in_background(text: str, fault: str) -> tuple[str, str, str]:
    """The error waits for `finish`; the next save works."""
    folder, background = Path(text), Background()
    strike(fault)
    background.start(folder, 1, 1, tensors_of(1), **facts_of(1))
    while not background.done:
        time.sleep(0.01)
    found = attempted(background.finish)
    assert names(folder) == []
    background.start(folder, 1, 1, tensors_of(1), **facts_of(1))
    background.finish()
    assert holds(folder / "step-00000001", 1)
    return found


def fail_then_start(text: str) -> tuple[str, list[str]]:
    """A second `start` does not hide that the first save failed, and begins nothing."""
    folder, background = Path(text), Background()
    strike("EIO@save.write rank=0")
    background.start(folder, 1, 1, tensors_of(1), **facts_of(1))
    outcome, *_ = attempted(lambda: background.start(folder, 2, 2, tensors_of(2), **facts_of(2)))
    assert background.done
    assert background.finish() is None
    return outcome, names(folder)
