"""From documents to a token table: tokenizer, tokenized parts, packed rows. Restartable, with digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.data.corpus import Document, documents, fingerprint
from trainer.data.pack import encode, pack
from trainer.data.table import facts_of
from trainer.data.tokenizer import given_digest, load_tokenizer, train_bpe
from trainer.files import digest, fsync_file, fsync_folder, read_json, sha256_file, write_json
from trainer.outcome import Outcome, RunError

FORMAT = 2
PART_BYTES = 32 << 20
SPLITS = ("train", "validation")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Path:
    """The folder of the token table that `config` needs, made if it is not there yet.

    A killed preparation goes on where it was: the tokenizer and each finished part are kept with their digests.

    Raises:
        RunError: no text, too little text for one sequence in a split, or an unusable tokenizer.
    """
    if config.table is not None:
        facts_of(Path(config.table))
        return Path(config.table)
    key = table_key(config)
    folder = Path(config.folder) / f"{_stem(config.path)}-{key[:12]}"
    if (folder / "table.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise RunError(
            f"the data folder cannot be written: {error.strerror}", where=config.folder, mend="set data.folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "table.json").exists():
            try:
                _make(config, key, folder, say)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise RunError(
                    "no space left for the token table",
                    where=config.folder,
                    mend="free some and start again: finished parts are kept",
                    outcome=Outcome.NO_SPACE,
                ) from None
    return folder


def table_key(config: DataConfig) -> str:
    """Digest of everything that the content of a table depends on."""
    settings = asdict(config)
    for name in ("folder", "table", "order_seed", "max_epochs"):
        del settings[name]
    assert config.path is not None
    sources = [fingerprint(config.path)]
    if config.validation_path is not None:
        sources.append(fingerprint(config.validation_path))
    given = None if config.tokenizer.path is None else given_digest(config.tokenizer.path)
    return digest({"format": FORMAT, "settings": settings, "sources": sources, "tokenizer": given})


def _make(config: DataConfig, key: str, folder: Path, say: Callable[[str], None]) -> None:
    work = folder.with_name(folder.name + ".partial")
    work.mkdir(exist_ok=True)
    if not (work / "tokenizer").exists():
        _make_tokenizer(config, work, say)
    tokenizer = load_tokenizer(work / "tokenizer")
    count, left_out = _make_parts(config, tokenizer, work, say)
    if left_out:
        say(f"left out of training: {left_out:,} documents that are also in the validation text")
    if table_key(config) != key:
        raise RunError("the corpus changed while it was prepared", where="data.path", mend="start again")
    parts = [work / f"part-{index:05d}.npz" for index in range(count)]
    width = config.sequence_length + 1
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        facts = pack(parts, split, work / f"{split}.arrow", width, len(tokenizer))
        facts["documents"] = sum(read_json(part.with_suffix(".json"))["documents"][split] for part in parts)
        if facts["sequences"] == 0:
            raise RunError(
                f"the {split} split has {facts.pop('dropped_tokens')} tokens, less than one sequence of {config.sequence_length}",
                where="data.path" if split == "train" else "data.validation_fraction",
                mend="give more text, a smaller data.sequence_length, or another data.validation_fraction"
                + ("" if config.documents != "file" else ", or data.documents: paragraph"),
            )
        if facts["max_token"] >= len(tokenizer):
            raise RunError(
                f"the tokenizer gives token {facts['max_token']}, beyond its vocabulary of {len(tokenizer)}",
                where="data.tokenizer.path",
                mend="give a tokenizer whose ids have no holes",
            )
        splits[split] = facts
    counts = splits["validation"].pop("histogram")
    splits["train"].pop("histogram")
    corpus = hashlib.sha256(
        "".join(read_json(p.with_suffix(".json"))["text_sha256"] for p in parts).encode()
    ).hexdigest()
    facts = {
        "format": FORMAT,
        "key": key,
        "path": config.path,
        "python": platform.python_version(),
        "corpus_digest": corpus,
        "tokenizer_digest": given_digest(config.tokenizer.path or str(work / "tokenizer")),
        "vocab_size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "sequence_length": config.sequence_length,
        "splits": splits,
        "left_out_of_training": left_out,
        "unigram_bits_per_byte": unigram_bits(counts) / max(splits["validation"]["bytes"], 1),
    }
    write_json(work / "table.json", facts)
    for part in parts:
        part.unlink()
        part.with_suffix(".json").unlink()
    fsync_folder(work)
    os.rename(work, folder)
    fsync_folder(folder.parent)
    say(
        f"prepared {splits['train']['sequences']:,} training and {splits['validation']['sequences']:,} validation sequences"
    )


def unigram_bits(counts: NDArray[np.int64]) -> float:
    """Bits that the counted tokens cost under their own unigram distribution."""
    seen = counts[counts > 0].astype(np.float64)
    return float(-(seen * np.log2(seen / seen.sum())).sum())


def _make_tokenizer(config: DataConfig, work: Path, say: Callable[[str], None]) -> None:
    partial = work / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.tokenizer.path is not None:
        load_tokenizer(Path(config.tokenizer.path)).save_pretrained(partial)
        if (Path(config.tokenizer.path) / "tokenizer.json").exists():  # byte for byte: its digest is its identity
            shutil.copy2(Path(config.tokenizer.path) / "tokenizer.json", partial / "tokenizer.json")
    else:
        texts = (document.text for split, document in _split(config) if split == "train")
        train_bpe(texts, config.tokenizer.vocab_size, partial)
        say(f"trained a byte-level BPE of {config.tokenizer.vocab_size:,} tokens")
    for file in partial.iterdir():
        fsync_file(file)
    os.rename(partial, work / "tokenizer")
    fsync_folder(work)


def _split(config: DataConfig) -> Iterator[tuple[str, Document]]:
    """Every document with its split: train, validation, or "" for one left out of training.

    Equal texts fall on the same side, so that the splits are disjoint.
    """
    assert config.path is not None
    if config.validation_path is None:
        for document in documents(config, config.path):
            share = int(hashlib.sha256(document.text.encode()).hexdigest()[:8], 16) / 2**32
            yield ("validation" if share < config.validation_fraction else "train"), document
        return
    held_back = set()
    for document in documents(config, config.validation_path):
        held_back.add(hashlib.sha256(document.text.encode()).digest())
        yield "validation", document
    for document in documents(config, config.path):
        yield ("" if hashlib.sha256(document.text.encode()).digest() in held_back else "train"), document


def _make_parts(config: DataConfig, tokenizer: Any, work: Path, say: Callable[[str], None]) -> tuple[int, int]:
    """Tokenize the documents in parts; a part whose digest is right is not made again.

    Returns the number of parts, and of documents left out of training.
    """
    index, size, left_out = 0, 0, 0
    waiting: list[tuple[str, Document]] = []

    def flush() -> None:
        nonlocal index, size
        _make_part(waiting, tokenizer, work / f"part-{index:05d}.npz", say)
        waiting.clear()
        index, size = index + 1, 0

    for entry in _split(config):
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


def _make_part(entries: list[tuple[str, Document]], tokenizer: Any, path: Path, say: Callable[[str], None]) -> None:
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
    for split in SPLITS:
        texts = [document.text for where, document in entries if where == split]
        arrays[f"{split}_tokens"], arrays[f"{split}_bytes"] = encode(tokenizer, texts)
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    fsync_file(path)
    counted = {split: sum(where == split for where, _ in entries) for split in SPLITS}
    write_json(record, {"text_sha256": text_digest.hexdigest(), "sha256": sha256_file(path), "documents": counted})
    say(f"tokenized {path.name}: {sum(len(arrays[f'{s}_tokens']) for s in SPLITS):,} tokens")


def _stem(path: str | list[str] | None) -> str:
    first = path if isinstance(path, str) else (path or ["table"])[0]
    stem = Path(first.rstrip("/*")).stem or "table"
    return "".join(c if c.isalnum() else "-" for c in stem)[:32]
