"""How many generations stay: the newest good ones, and never none."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged


def prune(checkpoints: Path, keep: int) -> list[str]:
    """Remove what is older than the newest `keep` good generations, and leftovers of broken saves; returns the names.

    A generation counts as good when its manifest reads and its files have their sizes; one that is not good is left for
    `load` to quarantine and does not count. Call it on one rank, after a save.
    """
    removed = []
    good = 0
    for folder in manifests.generations(checkpoints):
        if good >= keep:
            manifests.remove(folder)
            removed.append(folder.name)
            continue
        good += _looks_good(folder)
    for leftover in checkpoints.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
        removed.append(leftover.name)
    return removed


def _looks_good(folder: Path) -> bool:
    try:
        manifest = manifests.read(folder)
        manifests.check_names(folder, manifest)
        return all((folder / name).stat().st_size == facts["size"] for name, facts in manifest.files.items())
    except (Damaged, OSError):
        return False
