"""Loading: the newest generation that verifies, into live tensors, at any number of ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.checkpoint.retention import remove_leftovers
from trainer.checkpoint.save import describe, first_cause
from trainer.guard.faults import fault
from trainer.outcome import Outcome, RunError

_bad: set[Path] = set()
"""Damaged generations that could not be moved away: no rank of this process looks at them again."""


def newest_verified(
    checkpoints: Path, *, good: bool = False, before: int | None = None
) -> tuple[Path, Manifest] | None:
    """The newest generation that verifies, the same on all ranks; bad ones are named and moved to `quarantine/`.

    A bad one that cannot be moved (the folder is read-only) is named, left there and not looked at again. What killed
    saves left behind is removed. Only the run that holds the folder's lock may call this, and no save may be under way.

    Args:
        good: pass over generations that were saved in a streak of skipped steps; they stay where they are.
        before: only generations of earlier steps than this one.

    Raises:
        RunError: on all ranks alike, the checkpoints cannot be read on one of them.
    """

    def candidates() -> list[Path]:
        remove_leftovers(checkpoints)
        return [g for g in manifests.generations(checkpoints) if before is None or manifests.step_of(g) < before]

    for folder in distributed.on_rank_zero(candidates):
        if folder in _bad:
            continue
        manifest, damage = _examine(folder, good)
        if damage is not None or manifest is None:
            if not distributed.on_rank_zero(lambda folder=folder, damage=damage: _set_aside(folder, damage)):
                _bad.add(folder)
        elif manifest.good or not good:
            distributed.together(lambda: fault("load.verified"))
            return folder, manifest
    return None


def _examine(folder: Path, good: bool) -> tuple[Manifest | None, Damaged | None]:
    """Verify one generation, each rank its share of the files; one that is not asked for, by its manifest only."""
    manifest, mine = None, None
    try:
        manifest = manifests.read(folder)
        if manifest.good or not good:
            manifests.check_names(folder, manifest)
            for file in sorted(manifest.files)[distributed.rank() :: distributed.world()]:
                manifests.check_file(folder, manifest, file)
    except Damaged as damage:
        mine = (damage.file, damage.expected, damage.found)
    all_damage: list[tuple[str, str, str] | None] = [None] * distributed.world()
    dist.all_gather_object(all_damage, mine)
    first = next((damage for damage in all_damage if damage is not None), None)
    return manifest, Damaged(*first) if first is not None else None


def _set_aside(folder: Path, damage: Damaged | None) -> bool:
    """Move a damaged generation away and say so; whether that worked."""
    try:
        place = manifests.quarantine(folder, str(damage))
    except OSError as error:
        print(
            f"{folder.name} is damaged: {damage}; it stays, since it cannot be moved ({error.strerror}), and is not used",
            flush=True,
        )
        return False
    print(f"{folder.name} is damaged and moved to {place}: {damage}", flush=True)
    return True


def load(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], prefix: str = "") -> int:
    """Fill live tensors from a verified generation; returns how many were restored.

    Args:
        tensors: all tensors of the checkpoint whose names start with `prefix`, by name.

    Raises:
        RunError: a tensor is missing, too many, or of another shape or dtype than the live one; or, on all ranks alike,
            one of them cannot read.
    """
    saved = {name: facts for name, facts in manifest.tensors.items() if name.startswith(prefix)}
    live = {name: describe(tensor) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | live.keys()):
        if saved.get(name) != live.get(name):
            raise RunError(
                f"tensor {name} is {_text(saved.get(name))} in the checkpoint and {_text(live.get(name))} in this run",
                where=str(folder),
                mend="resume with the configuration that the checkpoint was saved with",
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled"
            )  # one process reads alone, as it means to
            dcp.load(tensors, storage_reader=_Reader(str(folder)), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        rank, cause = first_cause(error)
        raise RunError(
            f"{folder.name} could not be read: {cause}",
            where=f"rank {rank}, {folder}",
            mend="mend the disk, then resume; the checkpoint was verified before",
            outcome=Outcome.of_errno(cause.errno) if isinstance(cause, OSError) else Outcome.BUG,
        ) from cause
    if len(tensors) != len(saved):
        raise AssertionError(f"{len(tensors)} tensors restored, {len(saved)} saved")
    return len(tensors)


class _Reader(HuggingFaceStorageReader):
    """Where a fault can strike the read: here an error reaches all ranks through the collectives of `dcp.load`."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        fault("load.read")
        return super().read_data(plan, planner)


def _text(facts: dict[str, object] | None) -> str:
    return "absent" if facts is None else f"{facts['dtype']} {facts['shape']}"
