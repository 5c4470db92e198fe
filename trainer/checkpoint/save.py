"""Saving: all ranks write their shards into a new folder, hash what they wrote, and rank 0 makes it a checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Manifest
from trainer.files import fsync_file, fsync_folder, sha256_file
from trainer.guard.faults import fault
from trainer.outcome import Outcome, RunError
from trainer.runfolder import versions

MEND = "make room or mend the disk; older checkpoints are untouched, and the next save tries anew"


def save(
    checkpoints: Path,
    step: int,
    position: int,
    tensors: dict[str, Tensor],
    *,
    config: dict[str, Any],
    state: dict[str, Any],
    lineage: dict[str, Any],
    attempt: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a new generation; collective over all ranks. Returns its folder.

    The folder has a temporary name until all of it is on disk: files, fsync, hashes of what is read back, manifest,
    fsync, rename, fsync of the parent.

    Args:
        state: all that is no tensor; `good: False` marks a generation that must not count as a good one.
        group: the ranks' process group for the collectives of the save; the default group where it is left out.

    Raises:
        RunError: on all ranks alike: the generation exists, or a rank could not write (no space for a full disk or quota,
            else infrastructure). Older generations stay as they are, and nothing stays of this one.
    """
    final = checkpoints / manifests.name(step)
    temporary = checkpoints / temporary_name(step, attempt)

    def begin() -> None:
        with told(step, temporary):
            fault("save.begin")
            if distributed.rank() != 0:
                return
            checkpoints.mkdir(parents=True, exist_ok=True)
            if final.exists():
                raise RunError(f"there is a checkpoint {final.name} already", where=str(final), mend="resume from it")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def write() -> dict[str, dict[str, Any]]:
        with told(step, temporary):
            dcp.save(tensors, storage_writer=_Writer(str(temporary), save_distributed=True), process_group=group)
            fault("save.after_shard")
            return _hashes(temporary)

    def commit() -> None:
        with told(step, temporary):
            manifest = Manifest(
                step=step,
                position=position,
                world_size=distributed.world(),
                files={name: facts for part in parts for name, facts in sorted(part.items())},
                tensors={name: describe(tensor) for name, tensor in tensors.items()},
                config=config,
                state=state,
                versions=versions(),
                lineage=lineage,
                saved_at=time.time(),
            )
            fault("save.before_manifest")
            manifests.check_names(temporary, manifest)
            fsync_folder(temporary)
            manifests.write(temporary, manifest)
            fault("save.after_manifest")
            _rename(temporary, final)

    try:
        distributed.together(begin, group)
        parts = distributed.from_all(write, group)
        distributed.on_rank_zero(commit, group=group)
    except RunError:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def temporary_name(step: int, attempt: int) -> str:
    """The name of a generation while it is written."""
    return f"{manifests.name(step)}.tmp-{attempt}"


def describe(tensor: Tensor) -> dict[str, Any]:
    """Global shape and dtype, as the manifest lists them."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


@torch.no_grad()
def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether this rank's shards of all floating tensors hold neither NaN nor infinity.

    Smallest and largest element, in one pass: NaN comes through both. Temporaries are two numbers per tensor.
    """
    ends: list[Tensor] = []
    for tensor in tensors.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel():
            ends += [end.double() for end in torch.aminmax(local)]
    by_device: dict[torch.device, list[Tensor]] = {}
    for end in ends:
        by_device.setdefault(end.device, []).append(end)
    return all(bool(torch.stack(some).isfinite().all()) for some in by_device.values())


class _Writer(HuggingFaceStorageWriter):
    """Where a fault can strike the write: here an error reaches all ranks through the collectives of `dcp.save`."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        fault("save.write")
        return super().write_data(plan, planner)


@contextmanager
def told(step: int, path: Path, rank: int | None = None) -> Iterator[None]:
    """Turn an error of the disk into a sentence that names the rank and the path."""
    rank = distributed.rank() if rank is None else rank
    try:
        yield
    except (OSError, manifests.Damaged) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise RunError(
            f"the checkpoint of step {step} could not be saved: {error}",
            where=f"rank {rank}, {path}",
            mend=MEND,
            outcome=Outcome.of_errno(number),
        ) from error
    except dcp.CheckpointException as error:
        culprit, cause = first_cause(error)
        if not isinstance(cause, OSError):
            raise RunError(
                f"the checkpoint of step {step} could not be saved: {type(cause).__name__}: {cause}",
                where=f"rank {culprit}, {path}",
                mend="older checkpoints are untouched; please report this with the ranks' logs",
                outcome=Outcome.BUG,
            ) from cause
        with told(step, path, culprit):
            raise cause from None


def first_cause(error: dcp.CheckpointException) -> tuple[int, BaseException]:
    """The rank and the error that torch's checkpoint passed on to all ranks; an error of the system before others."""
    causes = sorted(((rank, cause) for rank, (cause, _) in error.failures.items()), key=lambda pair: pair[0])
    return next(((rank, cause) for rank, cause in causes if isinstance(cause, OSError)), causes[0])


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of this rank's files, which are on disk then."""
    fault("save.hash")
    files = {}
    # The storage writer numbers its files by rank, from 1.
    for path in sorted(folder.glob(f"shard-{distributed.rank() + 1:05d}-*")):
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def _rename(temporary: Path, final: Path) -> None:
    """Make the folder a checkpoint; when that cannot be made to last, take it back."""
    fault("save.rename")
    os.rename(temporary, final)
    try:
        fault("save.renamed")
        fsync_folder(final.parent)
    except OSError:
        with suppress(OSError):
            os.rename(final, temporary)
        raise
