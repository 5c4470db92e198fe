"""One token table from one source: documents split, tokenized in parts, packed into rows. Restartable, with digests."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import SourceConfig
from trainer.data.corpus import documents
from trainer.data.overlap import WINDOW, seen_in_training
from trainer.data.pack import encode, pack
from trainer.data.readers import Document
from trainer.data.tokenizer import given_digest, load_tokenizer
from trainer.files import fsync_file, fsync_folder, give_name, read_json, sha256_file, write_json
from trainer.outcome import RunError

FORMAT = 3
PART_BYTES = 32 << 20


@dataclass(frozen=True)
class Recipe:
    """What a table is made of."""

    source: SourceConfig
    """The text, its hub names fixed to commits."""
    tokenizer: Path
    """The tokenizer's folder."""
    sequence_length: int
    """Tokens that a row predicts."""
    key: str
    """Digest of all this."""
    still: Callable[[], str]
    """The digest as it is now: another one at the end means that files changed meanwhile."""


def make_table(recipe: Recipe, work: Path, say: Callable[[str], None]) -> None:
    """Make all files of a table in the folder `work`, `table.json` last.

    Raises:
        RunError: the corpus changed meanwhile, a split is less than one sequence, or ids are beyond the vocabulary.
    """
    if (work / "table.json").exists():  # killed between the last file and the table's name
        _remove_parts(work)
        return
    if not (work / "tokenizer").exists():
        copy_tokenizer(recipe.tokenizer, work)
    tokenizer = load_tokenizer(work / "tokenizer")
    count, left_out = _make_parts(recipe.source, tokenizer, work, say)
    if left_out:
        say(f"left out: {left_out:,} documents that are also in the text that is held back")
    if recipe.still() != recipe.key:
        raise RunError("the corpus changed while it was prepared", where="data.path", mend="start again")
    parts = [work / f"part-{index:05d}.npz" for index in range(count)]
    splits = {split: _pack_split(split, parts, recipe, work, len(tokenizer)) for split in splits_of(recipe.source)}
    counts = {split: facts.pop("histogram") for split, facts in splits.items()}
    seen = seen_in_training(parts, splits_of(recipe.source)[1:])
    corpus = "".join(read_json(part.with_suffix(".json"))["text_sha256"] for part in parts)
    facts = {
        "format": FORMAT,
        "key": recipe.key,
        "path": recipe.source.path,
        "validation_path": recipe.source.validation_path,
        "test_path": recipe.source.test_path,
        "python": platform.python_version(),
        "corpus_digest": hashlib.sha256(corpus.encode()).hexdigest(),
        "tokenizer_digest": given_digest(str(recipe.tokenizer)),
        "vocab_size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "sequence_length": recipe.sequence_length,
        "splits": splits,
        "left_out_of_training": left_out,
        "seen_in_training": seen,
        "unigram_bits_per_byte": unigram_bits(counts["validation"]) / max(splits["validation"]["bytes"], 1),
    }
    write_json(work / "table.json", facts)
    _remove_parts(work)
    say("prepared " + ", ".join(f"{facts['sequences']:,} {split}" for split, facts in splits.items()) + " sequences")
    for split, share in seen.items():
        say(f"{share:.2%} of the windows of {WINDOW} tokens in {split} also occur in training")


def splits_of(source: SourceConfig) -> tuple[str, ...]:
    """The splits that a source is divided into, training first."""
    test = source.test_path is not None or source.test_fraction is not None
    return ("train", "validation", "test") if test else ("train", "validation")


def divided(source: SourceConfig) -> Iterator[tuple[str, Document]]:
    """Every document with its split, or with "" for one that is left out because it is held back elsewhere.

    Equal texts fall on the same side, so that the splits are disjoint: test goes before validation, and both before train.

    Raises:
        RunError: the fractions leave nothing to train on.
    """
    assert source.path is not None
    shares = {"validation": 0.0 if source.validation_path is not None else source.validation_fraction}
    shares["test"] = 0.0 if source.test_path is not None else source.test_fraction or 0.0
    if sum(shares.values()) >= 1:
        raise RunError(
            f"validation and test together are {sum(shares.values()):g} of the documents",
            where="data.validation_fraction, data.test_fraction",
            mend="leave some for training",
        )
    held_back: set[bytes] = set()
    for split, path in (("test", source.test_path), ("validation", source.validation_path)):
        own = set()
        for document in documents(source, path) if path is not None else ():
            text = hashlib.sha256(document.text.encode()).digest()
            own.add(text)
            yield ("" if text in held_back else split), document
        held_back |= own
    for document in documents(source, source.path):
        text = hashlib.sha256(document.text.encode()).digest()
        place = int.from_bytes(text[:4], "big") / 2**32
        if text in held_back:
            yield "", document
        elif place < shares["validation"]:
            yield "validation", document
        else:
            yield ("test" if place < sum(shares.values()) else "train"), document


def unigram_bits(counts: NDArray[np.int64]) -> float:
    """Bits that the counted tokens cost under their own unigram distribution."""
    seen = counts[counts > 0].astype(np.float64)
    return float(-(seen * np.log2(seen / seen.sum())).sum())


def copy_tokenizer(folder: Path, work: Path) -> None:
    """Copy a tokenizer into the folder of a table, whole or not at all."""
    partial = work / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    load_tokenizer(folder).save_pretrained(partial)
    if (folder / "tokenizer.json").exists():  # byte for byte: its digest is its identity
        shutil.copy2(folder / "tokenizer.json", partial / "tokenizer.json")
    give_name(partial, work / "tokenizer")


def _make_parts(source: SourceConfig, tokenizer: Any, work: Path, say: Callable[[str], None]) -> tuple[int, int]:
    """Tokenize the documents in parts; a part whose digest is right is not made again.

    Returns the number of parts, and of documents left out of training.
    """
    index, size, left_out = 0, 0, 0
    waiting: list[tuple[str, Document]] = []

    def flush() -> None:
        nonlocal index, size
        _make_part(waiting, tokenizer, work / f"part-{index:05d}.npz", splits_of(source), say)
        waiting.clear()
        index, size = index + 1, 0

    for entry in divided(source):
        if not entry[0]:
            left_out += 1
            continue
        waiting.append(entry)
        size += len(entry[1].text)
        if size >= PART_BYTES:
            flush()
    if waiting:
        flush()
    return index, left_out


def _make_part(
    entries: list[tuple[str, Document]], tokenizer: Any, path: Path, splits: tuple[str, ...], say: Callable[[str], None]
) -> None:
    text_digest = hashlib.sha256()
    for split, document in entries:
        text_digest.update(f"{split}\0{document.name}\0{document.text}\0".encode())
    record = path.with_suffix(".json")
    if record.exists() and path.exists():
        facts = read_json(record)
        if facts["text_sha256"] == text_digest.hexdigest() and facts["sha256"] == sha256_file(path):
            say(f"{path.name} is there already")
            return
    arrays: dict[str, NDArray[Any]] = {}
    for split in splits:
        texts = [document.text for where, document in entries if where == split]
        arrays[f"{split}_tokens"], arrays[f"{split}_bytes"] = encode(tokenizer, texts)
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    fsync_file(path)
    counted = {split: sum(where == split for where, _ in entries) for split in splits}
    write_json(record, {"text_sha256": text_digest.hexdigest(), "sha256": sha256_file(path), "documents": counted})
    say(f"tokenized {path.name}: {sum(len(arrays[f'{s}_tokens']) for s in splits):,} tokens")


def _pack_split(split: str, parts: list[Path], recipe: Recipe, work: Path, vocab_size: int) -> dict[str, Any]:
    facts = pack(parts, split, work / f"{split}.arrow", recipe.sequence_length + 1, vocab_size)
    facts["documents"] = sum(read_json(part.with_suffix(".json"))["documents"][split] for part in parts)
    if facts["sequences"] == 0:
        raise RunError(
            f"the {split} split of {recipe.source.path} has {facts['dropped_tokens']} tokens, less than one sequence of "
            f"{recipe.sequence_length}",
            where="data.path" if split == "train" else f"data.{split}_fraction",
            mend="give more text, a smaller data.sequence_length, or another data."
            + ("validation_fraction" if split == "train" else f"{split}_fraction")
            + ("" if recipe.source.documents != "file" else ", or data.documents: paragraph"),
        )
    if facts["max_token"] >= vocab_size:
        raise RunError(
            f"the tokenizer gives token {facts['max_token']}, beyond its vocabulary of {vocab_size}",
            where="data.tokenizer.path",
            mend="give a tokenizer whose ids have no holes",
        )
    return facts


def _remove_parts(work: Path) -> None:
    for path in [*work.glob("part-*"), work / "pinned.json"]:
        path.unlink(missing_ok=True)
    fsync_folder(work)
