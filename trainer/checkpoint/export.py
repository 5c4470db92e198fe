"""A checkpoint as a Hugging Face folder: configuration, tokenizer, safetensors; proven by comparing logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load
from trainer.files import fsync_folder, read_json
from trainer.model.build import build, from_json, model_tensors
from trainer.model.init import initialize
from trainer.outcome import Outcome, RunError


def export(run: Path, checkpoint: Path, target: Path) -> float:
    """Export `checkpoint` of the run in `run` to the new folder `target`; returns the largest difference of logits.

    Raises:
        RunError: the target exists, the checkpoint does not verify, or the reloaded model answers differently.
    """
    if target.exists():
        raise RunError(f"{target} exists", where=str(target), mend="remove it, or export to another folder with --to")
    manifest = manifests.verify(checkpoint)
    model = restored_model(run, checkpoint, manifest)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True).save_pretrained(partial)
    difference = compare(model, partial)
    if difference != 0.0:
        raise RunError(
            f"the exported model's logits differ by {difference:g} from the trainer's",
            where=str(partial),
            mend="the export was not taken; please report this with the run's config.yaml",
            outcome=Outcome.BUG,
        )
    partial.rename(target)
    fsync_folder(target.parent)
    return difference


def restored_model(run: Path, checkpoint: Path, manifest: manifests.Manifest) -> Any:
    """The trainer's own model in one process, with the checkpoint's weights."""
    model = build(from_json(manifest.state["architecture"]))
    initialize(model, 0, torch.device("cpu"), weights=False)
    load(checkpoint, manifest, model_tensors(model), prefix="model.")
    return model.eval()


def compare(model: Any, folder: Path) -> float:
    """Largest difference between the logits of `model` and of the model that `transformers` loads from `folder`."""
    twin = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        theirs = twin(input_ids=ids, use_cache=False).logits
    return float((ours - theirs).abs().max())


def newest_export(run: Path) -> tuple[Path, bool]:
    """The export of the newest checkpoint of a run, made now if there is none; and whether it was made now."""
    generations = manifests.generations(run / "checkpoints")
    if not generations:
        raise RunError(f"run {run.name} has no checkpoint", where=str(run), mend=f"orthogon resume {run.name}")
    target = run / "export" / generations[0].name
    if (target / "config.json").exists() and read_json(target / "config.json"):
        return target, False
    export(run, generations[0], target)
    return target, True
