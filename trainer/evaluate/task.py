"""`orthogon evaluate`: a checkpoint's validation loss and its accuracy on multiple-choice tasks, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer import assembly, distributed, restore, setup
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.export import exported_model
from trainer.checkpoint.load import load
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches
from trainer.data.masking import Borders
from trainer.evaluate.choices import Question, read_questions, score
from trainer.evaluate.loss import mixed, validation_losses
from trainer.evaluate.text import load_tokenizer
from trainer.metrics.progress import Progress
from trainer.model.build import model_tensors
from trainer.model.init import initialize, place
from trainer.outcome import RunError
from trainer.parallel import fsdp2


@dataclass
class Evaluation:
    """A run's model, its weights still to be loaded, and the text to measure it on."""

    config: RunConfig
    data: Data
    model: Any
    strategy: Any
    validation: dict[str, Batches]
    """Of each source: validation, or test where that is asked for."""
    device: torch.device
    rows: int
    """Sequences that a rank takes through the model at once."""


def prepare(folder: Path, config: RunConfig, split: str) -> Evaluation:
    """The model of the run in `folder` without weights, spread over the ranks, and the text of `split`; collective.

    Raises:
        RunError: on all ranks alike: the data cannot be opened, has no such split, or the model cannot be made.
    """
    device = distributed.start(config.resources)
    opened = setup.open_data(config, folder, Progress(False, 0))
    if split == "test":
        opened = distributed.together(opened.tested)
    if config.parallel.name == "deepspeed":  # it trains; its checkpoints are those of all strategies
        config = replace(config, parallel=fsdp2.Options())
    # Compiling for a few forwards costs more than it saves, and the machine may have no compiler.
    config = replace(config, train=replace(config.train, compile=False))
    rank, world = distributed.rank(), distributed.world()
    strategy = distributed.together(lambda: assembly.open_strategy(config, device, world))
    _, below = assembly.starting_point(config, folder)
    shape = distributed.together(lambda: assembly.shape_of(config, opened.tokenizer, below))
    model = distributed.together(lambda: assembly.make(config, shape, strategy)).model
    initialize(model, config.seed, strategy.initial_device, weights=False)
    borders = Borders(opened.tokenizer["bos"], opened.tokenizer["eos"]) if config.data.document_masking else None
    rows = 8 if config.train.micro_batch_size == "auto" else config.train.micro_batch_size
    texts = {name: Batches(text, rank, world, rows, 1, borders) for name, text in opened.validation.items()}
    return Evaluation(config, opened, model, strategy, texts, device, rows)


def evaluate(
    folder: Path, config: RunConfig, step: int | None, export: Path | None, tasks: list[Path], split: str = "validation"
) -> dict[str, Any]:
    """Evaluate the checkpoint of `step` (none: the newest), or the weights of `export`, on `split` (validation or test).

    Collective over all ranks.

    Raises:
        RunError: on all ranks alike: no such checkpoint, a task that cannot be read, other data than the run's.
    """
    distributed.start(config.resources)
    shown = Progress(distributed.rank() == 0, 0)
    shown.stage("reading the data")
    questions = read_tasks(tasks)
    run = prepare(folder, config, split)
    if export is None:
        path, manifest = distributed.on_rank_zero(lambda: manifests.pick(folder, step))
        distributed.together(lambda: restore.check_data(manifest, run.data.identity()))
        load(path, manifest, model_tensors(run.model), prefix="model.")
        source = {"checkpoint": path.name, "step": manifest.step, "sequences_trained_on": manifest.position}
    else:
        distributed.together(lambda: fill(run.model, export))
        source = {"export": str(export)}
    run.strategy.connect(run.model, None)
    shown.stage(f"{split} loss")
    results = validation_losses(run)
    loss, value = mixed(results, run.data.measured)
    measured = {
        "loss": loss, "bits_per_byte": value,
        "tokens": sum(result.tokens for result in results.values()), "bytes": sum(result.bytes for result in results.values()),
    }  # fmt: skip
    if split == "validation":
        measured["share_of_unigram"] = value / run.data.unigram_bits_per_byte
    answer: dict[str, Any] = {"run": folder.name, **source, split: measured}
    if len(results) > 1:
        answer[split]["sources"] = {
            name: {"loss": r.loss, "bits_per_byte": r.bits_per_byte, "tokens": r.tokens} for name, r in results.items()
        }
    if questions:
        tokenizer = distributed.together(lambda: load_tokenizer(folder))
        run.model.eval()
        answer["tasks"] = {}
        for name, some in questions.items():
            shown.stage(f"task {name}")
            answer["tasks"][name] = distributed.together(
                lambda some=some: score(
                    run.model, tokenizer, some, length=config.data.sequence_length, batch=run.rows, device=run.device,
                    context=run.strategy.context,
                )
            )  # fmt: skip
    shown.stage("")
    return answer


def read_tasks(paths: list[Path]) -> dict[str, list[Question]]:
    """The questions of multiple-choice tasks, by the file's name, or by its path where names are equal; collective.

    Raises:
        RunError: on all ranks alike: a task that cannot be read.
    """
    stems = [path.stem for path in paths]
    names = {path: str(path) if stems.count(path.stem) > 1 else path.stem for path in paths}
    return distributed.on_rank_zero(lambda: {names[path]: read_questions(path) for path in paths})


@torch.no_grad()
def fill(model: Any, export: Path) -> None:
    """Give a (sharded) model the weights of an export, which each rank reads whole on its CPU.

    Raises:
        RunError: it is no export, or of another model.
    """
    whole = dict(model_tensors(exported_model(export)))
    tensors = model_tensors(model)
    for name in sorted(whole.keys() | tensors.keys()):
        theirs, ours = (list(side[name].shape) if name in side else None for side in (whole, tensors))
        if theirs != ours:
            raise RunError(
                f"{name} is {theirs} in the export and {ours} in the run",
                where=str(export),
                mend="give an export of this run's model",
            )
    for name, tensor in tensors.items():
        place(whole[name], tensor)
