"""`orthogon distill cache`: a teacher's targets for all training sequences of a configuration, written in parts by all ranks.

A part holds the same rows in the same batches whoever makes it, so its bytes do not depend on the number of ranks. It gets its name once
it is whole and on disk; what was killed goes on with the parts that are missing. The list of all files comes last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from trainer import distributed, setup
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches
from trainer.data.masking import Borders
from trainer.ensemble import cache, forms
from trainer.ensemble.targets import Heads
from trainer.ensemble.teachers import Members, check_vocabulary, resolve
from trainer.files import digest, fsync_folder, read_json, sha256_file, write_json
from trainer.guard import faults
from trainer.guard.faults import fault
from trainer.metrics.progress import Progress
from trainer.outcome import Outcome, RunError

PART_BYTES = 2**25
"""Of a part, about."""
OFFLOADED = "offloaded"
"""Where weights on disk lie meanwhile, a folder per rank."""
ROWS = 8
"""Sequences of a batch, where the configuration says `auto`."""


class InOrder:
    """The training sequences in the order of a cache: all of the first source, then of the next."""

    def __init__(self, data: Data) -> None:
        self.sources = data.train.sources
        self.ends = np.cumsum([source.sequences for source in self.sources])

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = [self._of(int(position)) for position in positions]
        return np.concatenate([tokens for tokens, _ in found]), np.concatenate([size for _, size in found])

    def bytes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.rows(positions)[1]

    def _of(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        index = int(np.searchsorted(self.ends, position, side="right"))
        before = int(self.ends[index - 1]) if index else 0
        return self.sources[index].rows(np.array([position - before]))


def make(
    teacher: str, config: RunConfig, form: forms.Form, folder: Path, *, offload: str | None = None
) -> dict[str, Any]:
    """Make or finish a cache; collective over all ranks.

    Args:
        teacher: an ensemble or a run under `config.runs`.
        config: whose `data`, precision, micro-batch size and resources count.
        folder: where it goes.
        offload: as in `Members`.

    Returns:
        JSON values: folder, rows, tokens, parts that were there before, bytes per token.

    Raises:
        RunError: on all ranks alike: no such teacher, other tokens than the data's, a folder that holds another cache, a
            form that does not fit the vocabulary, no room.
    """
    device = distributed.start(config.resources)
    shown = Progress(distributed.rank() == 0, 0)
    # A finished one is not written to: its disk may be read-only.
    whole = offload != "disk" and distributed.on_rank_zero(lambda: _is_whole(folder))
    with nullcontext() if whole else _turn(folder, shown):
        return _make(teacher, config, form, folder, offload, device, shown)


@contextmanager
def _turn(folder: Path, shown: Progress) -> Iterator[None]:
    """Only these ranks make the cache, and find no offloaded weights: another teacher's would be taken for theirs."""
    with distributed.turn(folder / "lock", str(folder), shown.say):
        distributed.on_rank_zero(lambda: shutil.rmtree(folder / OFFLOADED, ignore_errors=True))
        try:
            yield
        finally:
            if distributed.rank() == 0:  # who holds the lock
                shutil.rmtree(folder / OFFLOADED, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a cache is finished, with all of its files."""
    try:
        return all((folder / name).exists() for name in read_json(folder / cache.FILE)["cache"]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(
    teacher: str, config: RunConfig, form: forms.Form, folder: Path, offload: str | None,
    device: torch.device, shown: Progress,
) -> dict[str, Any]:  # fmt: skip
    shown.stage("reading the data")
    data = setup.open_data(config, folder, Progress(False, 0))
    ensemble = distributed.on_rank_zero(lambda: resolve(Path(config.runs), teacher))
    distributed.together(lambda: check_vocabulary(ensemble, data.tokenizer))
    distributed.together(lambda: _check_form(form, ensemble.vocab_size))
    stream = cache.stream_of(data, config)
    rows = sum(source.sequences for source in data.train.sources)
    shown.stage(f"loading {len(ensemble.members)} members")
    precision = config.train.precision
    members = Members(
        Path(config.runs), ensemble, precision, device, sharded=distributed.world() > 1 and offload is None,
        offload=offload, scratch=folder / OFFLOADED / str(distributed.rank()),
    )  # fmt: skip
    heads = members.heads()
    size = _row_bytes(form, heads, config.data.sequence_length)
    batch = ROWS if config.train.micro_batch_size == "auto" else config.train.micro_batch_size
    per_part = max(1, PART_BYTES // (size * batch)) * batch
    plan = cache.plan_of(form, ensemble, stream, precision, rows, per_part)
    distributed.on_rank_zero(lambda: _begin(folder, plan, rows * size, heads, form))
    parts = [cache.part_name(number) for number in range(-(-rows // per_part))]
    missing = distributed.on_rank_zero(lambda: [n for n, name in enumerate(parts) if not (folder / name).exists()])
    borders = Borders(data.tokenizer["bos"], data.tokenizer["eos"]) if config.data.document_masking else None
    batches = Batches(InOrder(data), 0, 1, batch, 1, borders)
    world, rank = distributed.world(), distributed.rank()
    for turn in range(-(-len(missing) // world)):
        shown.stage(f"{form.name} targets: part {turn * world + 1} of {len(missing)}")
        mine = missing[turn * world + rank :][:1]  # none for some ranks in the last turn, which answer with the others
        blobs: list[bytes] = []
        faults.locate(step=turn + 1)
        longest = min(per_part, rows - missing[turn * world] * per_part)  # of the turn's parts: only the last is short
        for start in range(0, longest, batch):
            first = (mine[0] if mine else 0) * per_part + start
            count = min(batch, max(0, rows - first)) if mine else 0
            target = members.answer(batches.at(first, count)[0].to(device))
            if count:  # records of masked rows are dropped
                blobs += form.encode(target, list(range(first, first + batch)))[:count]
        distributed.together(lambda mine=mine, blobs=blobs: [_write(folder / parts[n], _part(blobs)) for n in mine])
    digests = distributed.from_all(lambda: {name: _digest(folder / name) for name in parts[rank::world]})
    files: dict[str, Any] = {name: found for one in digests for name, found in one.items()}
    tokens = rows * config.data.sequence_length
    return distributed.on_rank_zero(lambda: _end(folder, plan, files, tokens, len(parts) - len(missing)))


def _check_form(form: forms.Form, vocabulary: int) -> None:
    if isinstance(form, forms.TopK) and not 1 <= form.k <= vocabulary:
        raise RunError(
            f"--k is {form.k}, of {vocabulary} tokens", where="command line, --k", mend="give 1 to the vocabulary"
        )
    if isinstance(form, forms.Sampled) and not 1 <= form.draws <= 2**forms.COUNT_BITS:
        raise RunError(f"--draws is {form.draws}", where="command line, --draws", mend="give 1 to 128")


def _row_bytes(form: forms.Form, heads: Heads, length: int) -> int:
    """Bytes of a row; at most, of sampled targets."""
    bits = forms.bits_of(heads.vocabulary)
    if isinstance(form, forms.Hidden):
        return length * heads.matrix.shape[1] * (2 if form.dtype == "bf16" else 4)
    if isinstance(form, forms.TopK):
        return -(-length * form.k * bits // 8) + length * (2 * form.k + 4)
    return length * (1 + form.draws * forms.item_bytes(bits))


def _begin(folder: Path, plan: dict[str, Any], needed: int, heads: Heads, form: forms.Form) -> None:
    """Write the plan, or find that it is the one that was begun; then the heads."""
    path = folder / cache.PLAN
    if path.exists():
        if read_json(path) != plan:
            raise RunError(
                "the folder holds a cache of something else: another form, teacher, text or precision",
                where=str(path),
                mend="choose another with --out, or remove it",
            )
    else:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise RunError(
                f"the cache takes up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                where=str(folder),
                mend="make room, or choose a smaller form",
                outcome=Outcome.NO_SPACE,
            )
        write_json(path, plan)
    for left in folder.glob(".*.tmp"):  # by makers that were killed
        left.unlink(missing_ok=True)
    if isinstance(form, forms.Hidden) and not (folder / cache.HEADS).exists():
        biases = {} if heads.biases is None else {"biases": heads.biases.cpu().contiguous()}
        _write(folder / cache.HEADS, [save({"matrix": heads.matrix.cpu().contiguous(), **biases})])


def _part(blobs: list[bytes]) -> Iterator[bytes]:
    """Offsets, and the records behind them."""
    sizes = np.array([len(blob) for blob in blobs], np.uint64)
    begin = np.uint64(8 * (len(blobs) + 1))
    yield (np.concatenate([np.zeros(1, np.uint64), np.cumsum(sizes, dtype=np.uint64)]) + begin).tobytes()
    yield from blobs


def _write(path: Path, pieces: Any) -> None:
    """A file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    fault("cache.part")
    temporary.rename(path)
    fsync_folder(path.parent)


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _end(folder: Path, plan: dict[str, Any], files: dict[str, Any], tokens: int, before: int) -> dict[str, Any]:
    """Write the list of all files, and say what was made."""
    parts = len(files)
    if (folder / cache.HEADS).exists():
        files[cache.HEADS] = _digest(folder / cache.HEADS)
    stored = sum(file["size"] for name, file in files.items() if name != cache.HEADS)
    facts = {**plan, "files": dict(sorted(files.items())), "tokens": tokens, "bytes_per_token": stored / tokens}
    path, record = folder / cache.FILE, {"cache": facts, "sha256": digest(facts)}
    if not path.exists():
        write_json(path, record)
    elif read_json(path) != record:
        raise RunError(
            "the finished cache is not what its list says", where=str(path), mend="remove the folder and make it again"
        )
    return {
        "folder": str(folder), "rows": plan["rows"], "tokens": tokens, "parts": parts, "before": before,
        "bytes_per_token": facts["bytes_per_token"],
    }  # fmt: skip
