"""Whether the disk has room for the checkpoints of a run, told before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from trainer.checkpoint import manifest as manifests
from trainer.outcome import Outcome, RunError


def check_room(checkpoints: Path, tensors: dict[str, Tensor], keep: int) -> str:
    """Compare the size of generations with the free space of the file system; returns a warning, or nothing.

    While a generation is written, the `keep` older ones are still there. Quotas are not seen here: a save tells them.
    Run it on rank 0.

    Raises:
        RunError: not even one generation fits beside what is there.
    """
    one = generation_bytes(tensors)
    try:
        free = shutil.disk_usage(next(p for p in (checkpoints, *checkpoints.parents) if p.exists())).free
        held = sum(_bytes(folder) for folder in manifests.generations(checkpoints))
    except OSError as error:
        return f"the free space for checkpoints is unknown: {error}"
    if free < one:
        raise RunError(
            f"a checkpoint of this run takes {_text(one)}, and {_text(free)} are free",
            where=str(checkpoints),
            mend="make room, or choose another disk with --runs=FOLDER",
            outcome=Outcome.NO_SPACE,
        )
    if free + held < (keep + 1) * one:
        return (
            f"{keep + 1} checkpoints of {_text(one)} (checkpoint.keep, and the one that is being written) take "
            f"{_text((keep + 1) * one)}, and there is room for {_text(free + held)} in {checkpoints}: saves will fail"
        )
    return ""


def generation_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of one generation, from global shapes and dtypes: what several ranks hold is written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
