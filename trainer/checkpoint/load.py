"""Loading: the newest generation that verifies, into live tensors, at any number of ranks."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.checkpoint.save import describe
from trainer.outcome import RunError


def newest_verified(checkpoints: Path, good: bool = False, before: int | None = None) -> tuple[Path, Manifest] | None:
    """The newest generation that verifies, the same on all ranks; bad ones are named and moved to `quarantine/`."""
    for folder in distributed.on_rank_zero(lambda: manifests.generations(checkpoints)):
        manifest, damage = _examine(folder)
        if damage is None and manifest is not None:
            if (good and not manifest.state.get("good", True)) or (before is not None and manifest.step >= before):
                continue
            return folder, manifest
        if distributed.rank() == 0:
            place = manifests.quarantine(folder, str(damage))
            print(f"{folder.name} is damaged and moved to {place}: {damage}", flush=True)
        dist.barrier()
    return None


def _examine(folder: Path) -> tuple[Manifest | None, Damaged | None]:
    """Verify one generation, each rank its share of the files."""
    manifest, mine = None, None
    try:
        manifest = manifests.read(folder)
        manifests.check_names(folder, manifest)
        for file in sorted(manifest.files)[distributed.rank() :: distributed.world()]:
            manifests.check_file(folder, manifest, file)
    except Damaged as damage:
        mine = (damage.file, damage.expected, damage.found)
    all_damage: list[tuple[str, str, str] | None] = [None] * distributed.world()
    dist.all_gather_object(all_damage, mine)
    first = next((damage for damage in all_damage if damage is not None), None)
    return manifest, Damaged(*first) if first is not None else None


def load(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], prefix: str = "") -> int:
    """Fill live tensors from a verified generation; returns how many were restored.

    Args:
        tensors: all tensors of the checkpoint whose names start with `prefix`, by name.

    Raises:
        RunError: a tensor is missing, too many, or of another shape or dtype than the live one.
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone, as it means to
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    if len(tensors) != len(saved):
        raise AssertionError(f"{len(tensors)} tensors restored, {len(saved)} saved")
    return len(tensors)


def _text(facts: dict[str, object] | None) -> str:
    return "absent" if facts is None else f"{facts['dtype']} {facts['shape']}"
