"""The average of the weights of several checkpoints of a run, as an export.

Uniform: theta = sum_i theta_i / K (checkpoint averaging; as "latest weight averaging" in Kaddour, arXiv 2209.14981).
EMA: theta_1 is the first checkpoint, theta_i = d theta_{i-1} + (1 - d) theta_i; a shadow that is updated at checkpoints only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.export import refuse_existing, unfilled_model, write
from trainer.checkpoint.manifest import Manifest
from trainer.model.build import model_tensors
from trainer.outcome import RunError


def weights_of(count: int, decay: float | None) -> list[float]:
    """The weight of each of `count` checkpoints, oldest first: 1/K, or the EMA's; they add up to 1."""
    if decay is None:
        return [1 / count] * count
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def average_checkpoints(
    run: Path, steps: list[int], decay: float | None, target: Path | None, say: Callable[[str], None]
) -> Path:
    """Write the average of the checkpoints of `steps` (none: of all) to a new folder; returns it.

    Memory holds one model and, of each tensor in turn, one checkpoint's copy and the sum in float64: as much for two
    checkpoints as for twenty.

    Raises:
        RunError: fewer than two checkpoints, one that does not verify, or the target exists.
    """
    known = [manifests.step_of(path) for path in reversed(manifests.generations(run / "checkpoints"))]
    chosen = sorted(set(steps)) or known
    if len(chosen) < 2:
        raise RunError(
            f"an average takes two checkpoints or more, and there {'is' if len(chosen) == 1 else 'are'} {len(chosen)}",
            where=str(run / "checkpoints"),
            mend=f"steps: {', '.join(map(str, known)) or 'none'}; checkpoint.keep says how many stay",
        )
    target = target or run / "export" / (
        f"average-{'uniform' if decay is None else f'ema{decay:g}'}-" + "-".join(map(str, chosen))
    )
    refuse_existing(target)
    sources = [manifests.pick(run, step) for step in chosen]
    shares = weights_of(len(chosen), decay)
    model = unfilled_model(sources[-1][1])
    tensors = model_tensors(model)
    _check(tensors, sources)
    for name, tensor in tensors.items():
        tensor.copy_(mean(name, tensor, [folder for folder, _ in sources], shares))
    record = {
        "run": run.name,
        "rule": "uniform" if decay is None else f"ema {decay:g}",
        "checkpoints": [
            {"name": folder.name, "weight": share, "position": manifest.position}
            for (folder, manifest), share in zip(sources, shares, strict=True)
        ],
    }
    difference = write(model, run, target, {"average.json": record})
    for folder, share in zip(chosen, shares, strict=True):
        say(f"{manifests.name(folder)}  weight {share:.4f}")
    say(f"exported the average to {target}; largest difference of logits: {difference:g}")
    return target


@torch.no_grad()
def mean(name: str, like: Tensor, folders: list[Path], shares: list[float]) -> Tensor:
    """The weighted mean of one tensor over the checkpoints, summed in float64; of integers, the newest checkpoint's."""
    total = torch.zeros(like.shape, dtype=torch.float64)
    for folder, share in zip(folders, shares, strict=True):
        if not like.is_floating_point() and folder != folders[-1]:
            continue
        piece = torch.empty(like.shape, dtype=like.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({name: piece}, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        if not like.is_floating_point():
            return piece
        total.add_(piece.double(), alpha=share)
    return total.to(like.dtype)


def _check(tensors: dict[str, Tensor], sources: list[tuple[Path, Manifest]]) -> None:
    """All checkpoints hold weights of the same names and shapes."""
    for folder, manifest in sources:
        saved = {name: facts["shape"] for name, facts in manifest.tensors.items() if name.startswith("model.")}
        for name in sorted(saved.keys() | tensors.keys()):
            live = list(tensors[name].shape) if name in tensors else None
            if saved.get(name) != live:
                raise RunError(
                    f"{name} is {saved.get(name)} in {folder.name} and {live} in the newest of the checkpoints",
                    where=str(folder),
                    mend="average checkpoints of one and the same model",
                )
