"""Synthetic text of a teacher as a token table: sampled in parts on all ranks, each by one of them; a killed start goes on.

What a table holds follows from its recipe alone: streams are decoded in the same batches on any number of ranks, and a part
that is there with its digest is not made again. Every rank holds a whole member, and of the joint ensemble all of them.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer import data, distributed, restore, runfolder, setup
from trainer.checkpoint.export import restored_model
from trainer.data.make import FORMAT, copy_tokenizer
from trainer.data.masking import Borders
from trainer.data.pack import write_rows
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest
from trainer.ensemble import manifest, recipe, text_statistics
from trainer.ensemble.joint import Joint
from trainer.ensemble.recipe import JOINT, Recipe
from trainer.ensemble.streams import decode
from trainer.evaluate.sampling import Sampling
from trainer.files import digest, fsync_file, fsync_folder, read_json, sha256_file, write_json
from trainer.metrics.progress import Progress
from trainer.outcome import Outcome, RunError

PART_TOKENS = 1 << 17
"""Tokens of a part, about: what a rank loses when it is killed."""
MEASURED_TOKENS = 1 << 22
"""First so many tokens that statistics are taken of: shares of distinct n-grams depend on the size of the text."""
BLOCK = 1024
"""Rows that are read or written at once."""


@dataclass(frozen=True)
class Part:
    """Some batches of one member."""

    member: int
    """Place among the models: 0 of the joint ensemble."""
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"part-{self.batches[0]:08d}"


def parts_of(made: Recipe) -> list[Part]:
    """All parts of a table. Batch b is of model b mod K."""
    models = 1 if made.mode == JOINT else len(made.members)
    batches = -(-made.sequences // made.batch)
    each = max(1, PART_TOKENS // (made.batch * made.sequence_length))
    own = [range(member, batches, models) for member in range(models)]
    return [
        Part(member, tuple(some[first : first + each]))
        for member, some in enumerate(own)
        for first in range(0, len(some), each)
    ]


def sample(folder: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Make the table of the recipe in `recipe.partial(folder)`; collective over all ranks.

    Args:
        overrides: of the first member's configuration, as far as a resume may change it.

    Returns:
        JSON values: the table's folder, and its statistics.

    Raises:
        RunError: on all ranks alike: a member is missing, corrupt or another one than in the recipe, its architecture cannot
            decode, the disk refuses, or another process makes the same table.
    """
    work = recipe.partial(folder)
    made = recipe.read(work / recipe.FILE)
    first = runs / made.members[0].run
    config = runfolder.open_run(first, overrides)
    device = distributed.start(config.resources)
    held: list[Any] = []
    distributed.on_rank_zero(lambda: held.append(_locked(work)))
    try:
        checkpoints = distributed.on_rank_zero(lambda: manifest.open_members(runs, _ensemble(made)))
        opened = setup.open_data(config, first, Progress(False, 0))
        for _, one in checkpoints:
            distributed.together(lambda one=one: restore.check_data(one, opened.identity()))
        _decode_missing(work, runs, made, checkpoints, opened, device)
        source = first / "tokenizer"
        facts = distributed.on_rank_zero(lambda: _assemble(folder, made, opened, source), timedelta(days=7))
    finally:
        for file in held:
            file.close()
    return {"table": str(folder), **facts["synthetic"]["statistics"]}


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
    missing = distributed.on_rank_zero(lambda: [part for part in parts if not _is_made(work, part, made)])
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


def _locked(work: Path) -> Any:
    """A file that is locked as long as it is open: nobody else makes the table.

    Raises:
        RunError: somebody does.
    """
    file = open(work / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError("another process samples this table", where=str(work), mend="wait for it") from None
    return file


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


def _is_made(work: Path, part: Part, made: Recipe) -> bool:
    """Whether a part is there, of this recipe and with its digest."""
    try:
        record = read_json(work / f"{part.name}.json")
        same = record["key"] == made.key and record["batches"] == list(part.batches)
        return same and record["sha256"] == sha256_file(work / f"{part.name}.npy")
    except (OSError, ValueError, KeyError, TypeError):
        return False


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


def _assemble(folder: Path, made: Recipe, opened: data.Data, tokenizer: Path) -> dict[str, Any]:
    """Put the parts together in the order of the streams, describe them, and give the table its name."""
    work = recipe.partial(folder)
    if not (work / "table.json").exists():
        _write_table(work, made, opened, tokenizer)
    data.verify(work)
    for path in [*work.glob("part-*"), *work.glob(".part-*"), work / recipe.FILE, work / "lock"]:
        path.unlink(missing_ok=True)
    try:
        os.rename(work, folder)
    except OSError as error:
        raise RunError(
            f"the table cannot be given its name: {error.strerror}", where=str(folder), mend="remove what is there",
            outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip
    fsync_folder(folder.parent)
    facts: dict[str, Any] = read_json(folder / "table.json")
    return facts


def _write_table(work: Path, made: Recipe, opened: data.Data, source: Path) -> None:
    if not (work / "tokenizer").exists():
        copy_tokenizer(source, work)
    tokenizer = load_tokenizer(work / "tokenizer")
    if len(tokenizer) != made.vocab_size:
        raise RunError(
            f"the run's tokenizer has {len(tokenizer)} tokens, and the teacher {made.vocab_size}",
            where=str(source), mend="restore the tokenizer of the run",
        )  # fmt: skip
    bos, eos = opened.tokenizer["bos"], opened.tokenizer["eos"]
    sizes = sizes_of(tokenizer)
    split = write_rows(
        ((rows, sizes(rows)) for rows in _rows(work, made)),
        work / "train.arrow",
        made.sequence_length + 1,
        made.vocab_size,
    )
    histogram = split.pop("histogram")
    records = [read_json(work / f"{part.name}.json") for part in parts_of(made)]
    figures = np.concatenate(
        list(_ordered(work, made, lambda part: np.array(read_json(work / f"{part.name}.json")["figures"])))
    )
    measured = _measured(work, made)
    found = text_statistics.summary(measured, bos, eos)
    texts = [measured, *(_some(held) for held in opened.validation.values())]
    copies = text_statistics.copied(texts, _training(opened))
    statistics = {
        "sequences": made.sequences,
        "tokens": made.tokens,
        "measured_tokens": measured[:, 1:].size,
        **found,
        "end_of_text_rate": float(histogram[eos] / histogram.sum()) if eos is not None else None,
        f"copied_{text_statistics.COPY}": copies[0],
        f"copied_{text_statistics.COPY}_of_validation": dict(zip(opened.validation, copies[1:], strict=True)),
        **_likelihood(figures),
    }
    write_json(
        work / "table.json",
        {
            "format": FORMAT,
            "key": made.key,
            "path": None,
            "python": platform.python_version(),
            "corpus_digest": digest([record["sha256"] for record in records]),
            "tokenizer_digest": tokenizer_digest(work / "tokenizer"),
            "vocab_size": made.vocab_size,
            "bos": bos,
            "eos": eos,
            "sequence_length": made.sequence_length,
            "splits": {
                "train": split | {"dropped_tokens": 0, "documents": int(histogram[eos]) if eos is not None else None}
            },
            "unigram_bits_per_byte": None,
            "synthetic": {"recipe": asdict(made), "key": made.key, "statistics": statistics},
        },
    )


def _likelihood(figures: NDArray[np.float64]) -> dict[str, float]:
    """Loss and entropy per sampled token with their standard errors over streams, from (streams, 3)."""
    tokens = figures[:, 2].sum()
    found = {}
    for name, column in (("teacher_loss", 0), ("teacher_entropy", 1)):
        mean = float(figures[:, column].sum() / tokens)
        rest = figures[:, column] - mean * figures[:, 2]
        found |= {name: mean, f"{name}_error": float(np.sqrt((rest**2).sum()) / tokens)}
    return found


def _ordered(work: Path, made: Recipe, read: Any) -> Iterator[NDArray[Any]]:
    """What `read` finds in the part of each batch, batch after batch, up to the last stream of the table."""
    at = {batch: (part, place) for part in parts_of(made) for place, batch in enumerate(part.batches)}
    kept: dict[int, tuple[str, Any]] = {}
    for batch in range(len(at)):
        part, place = at[batch]
        if kept.get(part.member, ("", None))[0] != part.name:
            kept[part.member] = (part.name, read(part))
        rows = kept[part.member][1][place * made.batch : (place + 1) * made.batch]
        yield rows[: made.sequences - batch * made.batch]


def _rows(work: Path, made: Recipe) -> Iterator[NDArray[np.int64]]:
    for rows in _ordered(
        work, made, lambda part: np.load(work / f"{part.name}.npy", mmap_mode="r", allow_pickle=False)
    ):
        yield rows.astype(np.int64)


def _measured(work: Path, made: Recipe) -> NDArray[np.int64]:
    """The first rows of the table, as many as statistics are taken of."""
    wanted, found = max(1, MEASURED_TOKENS // made.sequence_length), []
    for rows in _rows(work, made):
        found.append(rows[: max(0, wanted - sum(map(len, found)))])
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)


def _some(split: Any) -> NDArray[np.int64]:
    count = min(split.sequences, BLOCK)
    rows: NDArray[np.int64] = split.rows(np.arange(count))[0]
    return rows


def _training(opened: data.Data) -> Iterator[NDArray[np.int64]]:
    """The rows that the teacher was trained on."""
    for source in opened.train.sources:
        for first in range(0, source.sequences, BLOCK):
            yield source.rows(np.arange(first, min(first + BLOCK, source.sequences)))[0]


def sizes_of(tokenizer: Any) -> Any:
    """A function from rows of tokens (n, L + 1) to bytes of text behind their targets (n,).

    A token of a byte-level tokenizer stands for a fixed number of bytes, also where a row ends inside a character; rows of any other are decoded.
    """
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):

        def decoded(rows: NDArray[np.int64]) -> NDArray[np.int64]:
            texts = tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return np.array([len(text.encode()) for text in texts], np.int64)

        return decoded
    sizes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))], np.int64)
    sizes[tokenizer.all_special_ids] = 0
    return lambda rows: sizes[rows[:, 1:]].sum(1)
