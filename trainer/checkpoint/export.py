"""A checkpoint as a Hugging Face folder: configuration, tokenizer, safetensors; proven by comparing logits."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import config as configuration
from trainer import runfolder
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load
from trainer.files import give_name, write_json
from trainer.lock import turn
from trainer.model.build import build, from_json, model_tensors
from trainer.model.init import initialize
from trainer.outcome import Outcome, RunError


def export(run: Path, checkpoint: Path, manifest: manifests.Manifest, target: Path) -> float:
    """Export a verified checkpoint of the run in `run` to the new folder `target`; returns the largest difference of logits.

    Raises:
        RunError: the target exists, or the reloaded model answers differently.
    """
    refuse_existing(target)
    return write(restored_model(run, checkpoint, manifest), run, target)


def refuse_existing(target: Path) -> None:
    """Nothing is ever exported over something else."""
    if target.exists():
        raise RunError(f"{target} exists", where=str(target), mend="remove it, or choose another folder with --to")


def write(model: Any, run: Path, target: Path, records: dict[str, Any] | None = None) -> float:
    """Write a whole model with the run's tokenizer to a new folder, and compare what `transformers` loads from there.

    Args:
        records: JSON files to lie beside the weights, by name.

    Raises:
        RunError: the reloaded model answers differently.
    """
    with ExitStack() as held:
        with suppress(OSError):  # who may not write into the run does not export it beside others
            held.enter_context(
                turn(run / "export" / "lock", f"an export of {run.name}", lambda text: print(text, file=sys.stderr))
            )
        refuse_existing(target)
        return _write(model, run, target, records or {})


def _write(model: Any, run: Path, target: Path, records: dict[str, Any]) -> float:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.config.use_cache = True
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True).save_pretrained(partial)
    for name, record in records.items():
        write_json(partial / name, record)
    difference = compare(model, partial)
    if difference != 0.0:
        raise RunError(
            f"the exported model's logits differ by {difference:g} from the trainer's",
            where=str(partial),
            mend="the export was not taken; please report this with the run's config.yaml",
            outcome=Outcome.BUG,
        )
    give_name(partial, target)
    return difference


def restored_model(run: Path, checkpoint: Path, manifest: manifests.Manifest) -> Any:
    """The trainer's own model in one process, with the checkpoint's weights."""
    model = unfilled_model(manifest)
    load(checkpoint, manifest, model_tensors(model), prefix="model.")
    return model


def unfilled_model(manifest: manifests.Manifest) -> Any:
    """The trainer's own model in one process, its weights still to be loaded."""
    model: Any = build(from_json(manifest.state["architecture"]))
    initialize(model, 0, torch.device("cpu"), weights=False)
    return model.eval()


def loaded_model(run: Path, step: int | None, export: Path | None) -> tuple[Any, int, torch.device]:
    """A whole model that answers: of an export, or of the checkpoint of a step (none: the newest).

    Returns:
        (model, most tokens that it takes, its device).
    """
    if export is not None:
        config = runfolder.open_run(run)
        model = exported_model(export)
    else:
        checkpoint, manifest = manifests.pick(run, step)
        config = configuration.parse(manifest.config)
        model = restored_model(run, checkpoint, manifest)
    use_cuda = torch.cuda.is_available() and config.resources.device != "cpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    room = getattr(model.config, "max_position_embeddings", config.data.sequence_length)
    return model.to(device), room, device


def exported_model(folder: Path) -> Any:
    """The model that `transformers` loads from an export, in fp32.

    Raises:
        RunError: there is none.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise RunError(
            f"no model can be loaded: {text}", where=str(folder), mend="give the folder of an export with --export"
        ) from None


def compare(model: Any, folder: Path) -> float:
    """Largest difference between the logits of `model` and of the model that `transformers` loads from `folder`."""
    twin = exported_model(folder)
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        theirs = twin(input_ids=ids, use_cache=False).logits
    return float((ours - theirs).abs().max())


def export_of(run: Path, step: int | None = None) -> tuple[Path, bool]:
    """The export of a run's checkpoint (none: of the newest), made now if there is none; and whether it was made now."""
    checkpoint, manifest = manifests.pick(run, step)
    target = run / "export" / checkpoint.name
    if (target / "config.json").exists():
        return target, False
    try:
        export(run, checkpoint, manifest, target)
    except RunError:
        if (target / "config.json").exists():  # another process was waited for, and has made it
            return target, False
        raise
    return target, True
