"""Synthetic text of a teacher as a token table: sampled in parts on all ranks, each by one of them; a killed start goes on.

What a table holds follows from its recipe alone: streams are decoded in the same batches on any number of ranks, and a part
that is there with its digest is not made again. Every rank holds a whole member, and of the joint ensemble all of them.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import data, distributed, restore, runfolder, setup
from trainer.checkpoint.export import restored_model
from trainer.data.masking import Borders
from trainer.ensemble import manifest, recipe
from trainer.ensemble.joint import Joint
from trainer.ensemble.parts import Part, is_made, parts_of
from trainer.ensemble.recipe import JOINT, Recipe
from trainer.ensemble.streams import decode
from trainer.ensemble.synthetic_table import assemble
from trainer.evaluate.sampling import Sampling
from trainer.files import fsync_file, sha256_file, write_json
from trainer.lock import beside
from trainer.metrics.progress import Progress


def sample(folder: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Make the table of the recipe in `recipe.partial(folder)`; collective over all ranks.

    Args:
        overrides: of the first member's configuration, as far as a resume may change it.

    Returns:
        JSON values: the table's folder, and its statistics.

    Raises:
        RunError: on all ranks alike: a member is missing, corrupt or another one than in the recipe, its architecture cannot
            decode, or the disk refuses.
    """
    work, made = recipe.partial(folder), recipe.begun(folder)
    first = runs / made.members[0].run
    config = runfolder.open_run(first, overrides)
    device = distributed.start(config.resources)
    with distributed.turn(beside(folder), str(folder), Progress(distributed.rank() == 0, 0).say):
        if distributed.on_rank_zero(lambda: recipe.finished(folder, made)):  # by another process meanwhile
            return recipe.statistics(folder)
        checkpoints = distributed.on_rank_zero(lambda: manifest.open_members(runs, _ensemble(made)))
        opened = setup.open_data(config, first, Progress(False, 0))
        for _, one in checkpoints:
            distributed.together(lambda one=one: restore.check_data(one, opened.identity()))
        _decode_missing(work, runs, made, checkpoints, opened, device)
        source = first / "tokenizer"
        distributed.on_rank_zero(lambda: assemble(folder, made, opened, source), timedelta(days=7))
    return recipe.statistics(folder)


def _ensemble(made: Recipe) -> manifest.Ensemble:
    return manifest.Ensemble(
        name=made.teacher, rule=made.rule, members=made.members, tokenizer_sha256=made.tokenizer_sha256,
        vocab_size=made.vocab_size, padded_vocab_size=made.vocab_size, subset_sha256="",
    )  # fmt: skip


def _decode_missing(
    work: Path, runs: Path, made: Recipe, checkpoints: list[Any], opened: data.Data, device: torch.device
) -> None:
    """Make the parts that are not there yet, one member after another, a part on each rank at a time."""
    shown = Progress(distributed.rank() == 0, 0)
    parts, borders = parts_of(made), Borders(opened.tokenizer["bos"], opened.tokenizer["eos"])
    if distributed.on_rank_zero((work / "table.json").exists):
        return
    missing = distributed.on_rank_zero(lambda: [part for part in parts if not is_made(work, part, made)])
    if len(missing) < len(parts):
        shown.say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")
    clock = _Clock(shown, made)
    for member in sorted({part.member for part in missing}):
        todo = [part for part in missing if part.member == member]
        places = list(range(len(made.members))) if made.mode == JOINT else [member]
        _decode_parts(
            work, made, todo, [(runs / made.members[k].run, *checkpoints[k]) for k in places], borders, device, clock
        )


def _decode_parts(
    work: Path,
    made: Recipe,
    todo: list[Part],
    checkpoints: list[Any],
    borders: Borders,
    device: torch.device,
    clock: _Clock,
) -> None:
    """Make parts of one model, which is there no longer than this takes."""
    models = [restored_model(*one).to(device) for one in checkpoints]
    model = Joint(models, made.rule, made.vocab_size) if made.mode == JOINT else models[0]
    world = distributed.world()
    for start in range(0, len(todo), world):
        together = todo[start : start + world]

        def make(mine: list[Part] = together[distributed.rank() : distributed.rank() + 1]) -> None:
            for part in mine:
                _make_part(work, part, made, model, borders, device)

        distributed.together(make)
        clock.count(together)


class _Clock:
    """Tells how sampling goes."""

    def __init__(self, shown: Progress, made: Recipe) -> None:
        self.shown, self.made, self.done = shown, made, 0
        self.started = self.told = time.monotonic()

    def count(self, parts: list[Part]) -> None:
        self.done += sum(len(part.batches) for part in parts) * self.made.batch * self.made.sequence_length
        now = time.monotonic()
        if now - self.told > 10:
            self.told = now
            self.shown.say(f"sampled {self.done:,} tokens, {self.done / (now - self.started):,.0f} tokens/s")


def _make_part(work: Path, part: Part, made: Recipe, model: Any, borders: Borders, device: torch.device) -> None:
    """Decode the batches of a part, and write them: the record last."""
    sampling = Sampling(temperature=made.temperature, top_k=made.top_k, top_p=made.top_p, seed=made.seed)
    kind = np.uint16 if made.vocab_size <= 1 << 16 else np.int32
    tokens, figures = [], []
    for batch in part.batches:
        rows = range(batch * made.batch, (batch + 1) * made.batch)  # whole, wherever the table ends
        found = decode(
            model, rows, made.sequence_length, sampling, vocab_size=made.vocab_size, borders=borders,
            apart=made.document_masking, device=device,
        )  # fmt: skip
        tokens.append(found.tokens.astype(kind))
        figures.append(np.stack([found.losses, found.entropies, found.sampled], 1))
    path, temporary = work / f"{part.name}.npy", work / f".{part.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, np.concatenate(tokens), allow_pickle=False)
    fsync_file(temporary)
    os.replace(temporary, path)
    record = {"key": made.key, "batches": list(part.batches), "sha256": sha256_file(path)}
    write_json(work / f"{part.name}.json", record | {"figures": np.concatenate(figures).tolist()})
