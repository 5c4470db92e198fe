"""Continued pretraining: a model that starts from weights, in the Hugging Face format or in one of our checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.model.build import as_json, from_json, model_tensors
from trainer.model.init import place
from trainer.outcome import RunError

WHERE = "model.init_from"


@dataclass(frozen=True)
class Source:
    """Where weights lie. Without a manifest: a folder in the Hugging Face format."""

    folder: Path
    tokenizer: Path
    manifest: Manifest | None = None

    def architecture(self) -> dict[str, Any]:
        """The `transformers` configuration of the weights as JSON values."""
        if self.manifest is not None:
            values: dict[str, Any] = self.manifest.state["architecture"]
            return values
        try:
            shape = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises its own kinds
            raise _refused(f"no architecture can be read: {' '.join(str(error).split())[:200]}", self.folder) from None
        return as_json(shape)

    def lineage(self) -> dict[str, Any]:
        """What a run that starts here records of it."""
        known = {} if self.manifest is None else {"step": self.manifest.step, "position": self.manifest.position}
        return {"init_from": str(self.folder), **known}


def find(path: str) -> Source:
    """The weights at `path`: a Hugging Face folder (an export of ours is one), a run's folder, or one of its checkpoints.

    A checkpoint is verified whole; of a run the newest that verifies is taken.

    Raises:
        RunError: there are no weights, or none that verify.
    """
    folder = Path(path)
    if (folder / manifests.FILE).exists():
        return _checkpoint(folder, folder.resolve().parents[1] / "tokenizer", str(folder))
    if (folder / "checkpoints").is_dir():
        problem = None
        for generation in manifests.generations(folder / "checkpoints"):
            try:
                return _checkpoint(generation, folder / "tokenizer", path)
            except RunError as error:
                problem = problem or error
        raise problem or _refused("the run has no checkpoint", folder)
    if (folder / "config.json").exists() and list(folder.glob("*.safetensors")):
        return Source(folder, folder)
    raise _refused(
        "there are no weights: a Hugging Face folder holds config.json and *.safetensors, a run's folder checkpoints/",
        folder,
    )


def _checkpoint(folder: Path, tokenizer: Path, path: str) -> Source:
    try:
        manifest = manifests.verify(folder)
    except Damaged as damage:
        raise _refused(f"the checkpoint is damaged: {damage}", path) from None
    if "architecture" not in manifest.state:
        raise _refused("the checkpoint does not say its architecture", path)
    return Source(folder, tokenizer, manifest)


def check_vocabulary(source: Source, tokenizer: Path) -> None:
    """Refuse weights whose tokens mean something else than the run's.

    Raises:
        RunError: the tokenizer of the weights is not there, or gives some token another id.
    """
    if not list(source.tokenizer.glob("tokenizer*")):
        raise _refused("no tokenizer lies with the weights to compare the run's with", source.tokenizer)
    theirs, ours = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
        for folder in (source.tokenizer, tokenizer)
    )
    differing = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if differing:
        raise RunError(
            f"the run's tokenizer is not that of the weights: {len(differing)} tokens differ, e.g. {differing[0]!r} is "
            f"{ours.get(differing[0])} in the data and {theirs.get(differing[0])} in the weights",
            where=f"{WHERE}, data.tokenizer.path",
            mend=f"prepare the data with data.tokenizer.path: {source.tokenizer}",
        )


def load_weights(model: Any, source: Source) -> int:
    """Fill a (sharded) model's weights and persistent buffers; collective. Returns how many tensors.

    A checkpoint of ours is read by all ranks, each its shards. In the Hugging Face format rank 0 lets `transformers`
    read (which knows how names and layouts changed over time) and sends one whole tensor at a time.

    Raises:
        RunError: on all ranks alike: a weight is missing, or has another shape.
    """
    tensors = model_tensors(model)
    if source.manifest is not None:
        try:
            return load(source.folder, source.manifest, tensors, prefix="model.")
        except RunError as error:
            raise _refused(error.what, source.folder, "leave model.config as the weights have it") from None
    alone = distributed.rank() == 0
    twin = distributed.together(lambda: _read(source.folder, model.config) if alone else None)
    wholes = model_tensors(twin) if twin is not None else {}
    for name, target in tensors.items():
        whole = wholes[name].to(target.dtype) if alone else torch.empty(target.shape, dtype=target.dtype)
        dist.broadcast(whole, src=0)
        place(whole, target)
    return len(tensors)


def _read(folder: Path, shape: Any) -> Any:
    """The whole model in CPU memory, every weight of it from the folder."""
    logging.set_verbosity_error()  # the sentences below say what its report says
    logging.disable_progress_bar()
    try:
        model, facts = AutoModelForCausalLM.from_pretrained(
            folder, config=from_json(as_json(shape)), dtype=torch.float32, local_files_only=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # the library raises its own kinds
        raise _refused(f"the weights cannot be loaded: {' '.join(str(error).split())[:300]}", folder) from None
    missing = sorted({*facts["missing_keys"], *(key for key, *_ in facts["mismatched_keys"])})
    if missing:
        raise _refused(
            f"{len(missing)} weights are missing or of another shape, e.g. {missing[0]}", folder,
            "leave model.config as the weights have it",
        )  # fmt: skip
    return model


def _refused(
    what: str, where: Path | str, mend: str = "give a Hugging Face folder, a run's folder or a checkpoint"
) -> RunError:
    return RunError(what, where=f"{WHERE}, {where}", mend=mend)
