"""How many generations stay: the newest good ones, and never none. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged
from trainer.guard.faults import fault


class Pruned(NamedTuple):
    """What a removal did."""

    removed: list[str]
    """Names of the folders that are gone."""
    problem: str
    """What could not be removed, as a sentence; empty if all could."""


def prune(checkpoints: Path, keep: int, writing: str = "") -> Pruned:
    """Remove what is older than the newest `keep` good generations, and leftovers of broken saves.

    A generation counts when its manifest reads and says that it is good (not saved in a streak of skipped steps), and its
    files have their sizes. One that does not count and is newer than they stays: `load` quarantines the damaged.
    Call it on one rank, after a save. Never raises for an error of the disk: old generations then stay for the next time.

    Args:
        writing: the temporary folder that a save in the background is writing.
    """
    old, counted = [], 0
    for folder in manifests.generations(checkpoints):
        if counted >= max(keep, 1):
            old.append(folder)
        else:
            counted += _counts(folder)
    removed, problem = _remove(reversed(old))
    return Pruned([*removed, *remove_leftovers(checkpoints, writing)], problem)


def drop_newer(checkpoints: Path, step: int) -> Pruned:
    """Remove the generations after `step`: the run went back there, and will save those steps anew. On one rank."""
    return _remove(folder for folder in manifests.generations(checkpoints) if manifests.step_of(folder) > step)


def remove_leftovers(checkpoints: Path, writing: str = "") -> list[str]:
    """Remove what killed saves left behind, but for the folder of the name `writing`; returns the names."""
    found = [path for path in checkpoints.glob("step-*.tmp-*") if path.name != writing]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found if not path.exists()]


def _remove(folders: Iterable[Path]) -> Pruned:
    removed, problem = [], ""
    for folder in folders:
        try:
            fault("save.prune")
            manifests.remove(folder)
            removed.append(folder.name)
        except OSError as error:
            problem = problem or f"{folder.name} could not be removed and stays for now: {error}"
    return Pruned(removed, problem)


def _counts(folder: Path) -> bool:
    try:
        manifest = manifests.read(folder)
        manifests.check_names(folder, manifest)
        sizes_right = all((folder / name).stat().st_size == facts["size"] for name, facts in manifest.files.items())
        return manifest.good and sizes_right
    except (Damaged, OSError):
        return False
