"""`orthogon ensemble evaluate`: losses of all members and of their subsets on the same text, the same on any number of ranks.

First the members, one after another, turn the text into hidden states on disk; then one pass over blocks of logits gives
the losses of all subsets. A block holds the same tokens on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer import distributed, restore
from trainer.checkpoint.load import load
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch
from trainer.ensemble import curve, manifest, subsets
from trainer.ensemble.prediction import chunks, subset_losses
from trainer.ensemble.states import HiddenStates, check_room, hidden_states
from trainer.evaluate.choices import Question, Row, batches_of, graded, rows_of
from trainer.evaluate.task import Evaluation, prepare, read_tasks
from trainer.evaluate.text import load_tokenizer
from trainer.metrics.progress import Progress
from trainer.model.build import model_tensors


@dataclass(frozen=True)
class Portion:
    """One batch of this rank. `rows` are the places of its rows in the text or task `of`; rows behind them do not count."""

    of: str
    rows: list[int]
    batch: MicroBatch


@dataclass(frozen=True)
class Texts:
    """What is asked: the sequences of each source, and the rows of each task."""

    run: Evaluation
    tasks: dict[str, list[Row]]

    def sequences(self, name: str) -> int:
        total = self.run.data.validation[name].sequences
        return min(total, self.run.config.evaluate.sequences or total)

    def counts(self) -> dict[str, int]:
        """Rows of each text and task, by what a `Portion` calls it."""
        found = {f"text {name}": self.sequences(name) for name in self.run.validation}
        return found | {f"task {name}": len(rows) for name, rows in self.tasks.items()}

    def portions(self) -> Iterator[Portion]:
        """This rank's batches, the same in every pass; every rank has as many."""
        for name, batches in self.run.validation.items():
            total, room = self.sequences(name), distributed.world() * batches.rows
            for start in range(0, total, room):
                first = start + distributed.rank() * batches.rows
                rows = list(range(first, min(first + batches.rows, total)))
                yield Portion(f"text {name}", rows, batches.at(start, min(room, total - start))[0])
        for name, all_rows in self.tasks.items():
            for indices, inputs, targets in batches_of(all_rows, self.run.rows):
                yield Portion(f"task {name}", indices, MicroBatch(inputs, targets, None))


def evaluate(
    name: str, runs: Path, config: RunConfig, tasks: list[Path], *, split: str, most: int, seed: int
) -> dict[str, Any]:
    """Evaluate an ensemble and subsets of its members; collective over all ranks.

    Args:
        config: of the first member, with what an evaluation may change.
        tasks: multiple-choice files.
        split: validation or test.
        most: subsets of members, as `subsets.choose` takes it.
        seed: of the sample of subsets and of the bootstrap.

    Returns:
        JSON values: the ensemble, `text` (sequences, tokens, bytes), `curves` by rule (`curve.curve`, with bits per byte),
        the single `members` and, with tasks, `tasks`: the ensemble's accuracies by its own rule, and the members'.

    Raises:
        RunError: on all ranks alike: a member is missing, corrupt or another one than the ensemble was made of, the data is
            not the members', a task cannot be read, the disk has no room.
    """
    distributed.start(config.resources)
    shown = Progress(distributed.rank() == 0, 0)
    shown.stage("reading the data")
    ensemble = distributed.on_rank_zero(lambda: manifest.read(runs, name))
    checkpoints = distributed.on_rank_zero(lambda: manifest.open_members(runs, ensemble))
    questions = read_tasks(tasks)
    first = runs / ensemble.members[0].run
    run = prepare(first, config, split)
    for _, one in checkpoints:
        distributed.together(lambda one=one: restore.check_data(one, run.data.identity()))
    texts = Texts(run, _rows(questions, first, config))
    chosen = subsets.choose(len(ensemble.members), most, seed)
    folder = manifest.folder_of(runs, name)
    tokens = sum(portion.batch.inputs.numel() for portion in texts.portions())
    distributed.together(
        lambda: check_room(folder, len(ensemble.members), tokens, run.model, distributed.world())
    )  # ranks on other nodes may share the file system
    members = []
    for member, (path, one) in zip(ensemble.members, checkpoints, strict=True):
        shown.stage(f"{split} text through {member.run}")
        load(path, one, model_tensors(run.model), prefix="model.")
        if run.strategy.forward is None:
            run.strategy.connect(run.model, None)
        batches = (portion.batch for portion in texts.portions())
        members.append(hidden_states(run.model, run.strategy, batches, folder, run.device))
    shown.stage(f"losses of {len(chosen)} subsets")
    losses, predicted = _losses(texts, members, chosen, ensemble.vocab_size, run.device)
    shown.stage("")
    answer = _answer(ensemble, texts, chosen, losses, predicted, seed)
    if questions:
        answer["tasks"] = {
            task: _graded(ensemble, some, texts.tasks[task], chosen, losses[f"task {task}"])
            for task, some in questions.items()
        }
    return {"split": split, **answer}


def _rows(questions: dict[str, list[Question]], run: Path, config: RunConfig) -> dict[str, list[Row]]:
    if not questions:
        return {}
    tokenizer = distributed.together(lambda: load_tokenizer(run))
    length = config.data.sequence_length
    return distributed.together(lambda: {name: rows_of(tokenizer, some, length) for name, some in questions.items()})


def _losses(
    texts: Texts, members: list[HiddenStates], chosen: list[tuple[int, ...]], vocabulary: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each text and task: losses (2, subsets, rows) in nats, by rule, and predicted tokens (rows,); all ranks' together."""
    counts = texts.counts()
    losses = {of: torch.zeros(2, len(chosen), count, dtype=torch.float64) for of, count in counts.items()}
    predicted = {of: torch.zeros(count, dtype=torch.float64) for of, count in counts.items()}
    tokens, columns = chunks(len(members), members[0].states.width)
    offset = 0
    for portion in texts.portions():
        targets = portion.batch.targets
        for member in members:
            member.offset = offset
        offset += targets.numel()
        if not portion.rows:
            continue
        found = subset_losses(members, targets.flatten(), chosen, vocabulary, tokens=tokens, columns=columns)
        of, count = portion.of, len(portion.rows)
        losses[of][:, :, portion.rows] = found.unflatten(2, targets.shape).sum(3)[:, :, :count]
        predicted[of][portion.rows] = (targets >= 0).sum(1).double()[:count]
    for parts in (losses, predicted):
        for of, part in parts.items():
            moved = part.to(device)
            dist.all_reduce(moved)  # every number is one rank's, and 0 on the others
            parts[of] = moved.cpu()
    return losses, predicted


def _answer(
    ensemble: manifest.Ensemble, texts: Texts, chosen: list[tuple[int, ...]], losses: dict[str, Tensor],
    predicted: dict[str, Tensor], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Curves over the number of members, and the members one by one."""
    data, sizes = texts.run.data, {name: texts.sequences(name) for name in texts.run.validation}
    tokens = {name: float(predicted[f"text {name}"].sum()) for name in sizes}
    size = {name: texts.run.validation[name].bytes(0, count) for name, count in sizes.items()}
    density = sum(float(data.measured[n]) * max(size[n], 1) / max(tokens[n], 1.0) for n in sizes)  # bytes per token
    curves = {}
    values = np.zeros(0)
    for index, rule in enumerate(manifest.RULES):
        sources = [
            curve.Source(float(data.measured[n]), losses[f"text {n}"][index].numpy(), predicted[f"text {n}"].numpy())
            for n in sizes
        ]
        values = curve.losses(sources)
        points = curve.curve(chosen, values, curve.resampled(sources, curve.DRAWS, seed))
        curves[rule] = [point | {"bits_per_byte": point["loss"] / math.log(2) / density} for point in points]
    own = zip(ensemble.members, values, strict=False)  # the first subsets are the single members, alike by either rule
    return {
        "ensemble": ensemble.name,
        "rule": ensemble.rule,
        "members": [{"run": member.run, "step": member.step, "loss": float(value)} for member, value in own],
        "text": {
            "sequences": sum(sizes.values()), "tokens": int(sum(tokens.values())), "bytes": sum(size.values()),
        },
        "subsets": {"evaluated": len(chosen), "of": 2 ** len(ensemble.members) - 1, "seed": seed},
        "curves": curves,
    }  # fmt: skip


def _graded(
    ensemble: manifest.Ensemble, questions: list[Question], rows: list[Row], chosen: list[tuple[int, ...]], losses: Tensor
) -> dict[str, Any]:  # fmt: skip
    """A task's accuracies, of the whole ensemble by its rule and of each member."""
    whole = losses[manifest.RULES.index(ensemble.rule), chosen.index(tuple(range(len(ensemble.members))))]
    return {
        "ensemble": graded(questions, rows, (-whole).tolist()),
        "members": [graded(questions, rows, (-losses[0, index]).tolist()) for index in range(len(ensemble.members))],
    }
