"""The token tables that a configuration needs: found again by what they are made of, or made, one per source."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config import DataConfig, SourceConfig
from trainer.config_data import SINGLE, sources_of, weights_of
from trainer.data.corpus import fingerprint, pinned
from trainer.data.make import FORMAT, Recipe, divided, make_table
from trainer.data.table import facts_of
from trainer.data.tokenizer import given_digest, load_tokenizer, train_bpe
from trainer.files import digest, fsync_folder, give_name, read_json, write_json
from trainer.lock import beside, turn
from trainer.outcome import Outcome, RunError

# What the documents of a source, and their split, depend on; of the test split only where there is one.
_DOCUMENTS = ("path", "documents", "text_key", "validation_path", "validation_fraction")
_TEST = ("test_path", "test_fraction")
_PATHS = ("path", "validation_path", "test_path")


def prepare(
    config: DataConfig, say: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> dict[str, Path]:
    """The folders of the token tables of all sources, by name; those that are not there yet are made.

    A killed preparation goes on where it was: the tokenizer, finished tables and each finished part of a table are kept.
    A table has its name only once it is whole.

    Args:
        check: called while another process is waited for; may raise.

    Raises:
        RunError: no text, too little text for one sequence in a split, an unusable tokenizer, no hub, no space.
    """
    sources = sources_of(config)
    folders = {name: _folder(name, source, config) for name, source in sources.items()}
    for name, folder in folders.items():
        if sources[name].table is not None:
            facts_of(folder)
        elif not _is_made(folder):
            with _alone(folder, say, check):
                if not _is_made(folder):
                    _make(name, sources[name], config, folder, say, check)
    return folders


def table_key(source: SourceConfig, config: DataConfig) -> str:
    """Digest of everything that the content of a table depends on."""
    return digest(
        {
            "format": FORMAT,
            "documents": _documents_key(source),
            "sequence_length": config.sequence_length,
            "tokenizer": tokenizer_key(config),
        }
    )


def tokenizer_key(config: DataConfig) -> str:
    """Digest of the given tokenizer, or of all that a trained one depends on."""
    if config.tokenizer.path is not None:
        return given_digest(config.tokenizer.path)
    texts = [_documents_key(source) for source in _for_tokenizer(config).values()]
    return digest({"format": FORMAT, "vocab_size": config.tokenizer.vocab_size, "texts": texts})


def _documents_key(source: SourceConfig) -> dict[str, Any]:
    paths = [path for name in _PATHS if (path := getattr(source, name)) is not None]
    settings = {name: getattr(source, name) for name in _DOCUMENTS}
    settings |= {name: value for name in _TEST if (value := getattr(source, name)) is not None}
    return settings | {"files": [fingerprint(path) for path in paths]}


def _folder(name: str, source: SourceConfig, config: DataConfig) -> Path:
    if source.table is not None:
        return Path(source.table)
    stem = _stem(source.path) if name == SINGLE else name
    return Path(config.folder) / f"{stem}-{table_key(source, config)[:12]}"


def _is_made(folder: Path) -> bool:
    return (folder / "table.json").exists()


def _make(
    name: str, source: SourceConfig, config: DataConfig, folder: Path, say: Callable[[str], None],
    check: Callable[[], None],
) -> None:  # fmt: skip
    tokenizer = _tokenizer_folder(config, say, check)
    work = _work(folder)
    recipe = Recipe(
        source=_pinned(source, folder),
        tokenizer=tokenizer,
        sequence_length=config.sequence_length,
        key=table_key(source, config),
        still=lambda: table_key(source, config),
    )
    for_whom = "" if name == SINGLE else f"{name}: "
    make_table(recipe, work, lambda line: say(for_whom + line))
    os.rename(work, folder)
    fsync_folder(folder.parent)


def _work(folder: Path) -> Path:
    """Where the files of a table lie until it is whole."""
    return folder.with_name(folder.name + ".partial")


def _pinned(source: SourceConfig, folder: Path) -> SourceConfig:
    """The source with the commits of its hub names fixed; a restart takes those of the first start."""
    record = folder / "table.json" if _is_made(folder) else _work(folder) / "pinned.json"
    if not record.exists():
        paths = {key: pinned(getattr(source, key)) for key in _PATHS}
        record.parent.mkdir(exist_ok=True)
        write_json(record, paths)
    fixed = read_json(record)
    return replace(source, **{key: fixed.get(key) for key in _PATHS})


def _tokenizer_folder(config: DataConfig, say: Callable[[str], None], check: Callable[[], None]) -> Path:
    """The tokenizer that was given, or one trained on training documents."""
    if config.tokenizer.path is not None:
        return Path(config.tokenizer.path)
    folder = Path(config.folder) / f"tokenizer-{tokenizer_key(config)[:12]}"
    with _alone(folder, say, check):
        if not folder.exists():
            _train_tokenizer(config, folder, say)
    return folder


def _for_tokenizer(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources on whose text a tokenizer is trained: all that the run trains on."""
    weights = weights_of(config)
    return {name: source for name, source in sources_of(config).items() if source.path is not None and weights[name]}


def _train_tokenizer(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fixed = [_pinned(source, _folder(name, source, config)) for name, source in _for_tokenizer(config).items()]
    texts = (document.text for source in fixed for split, document in divided(source) if split == "train")
    train_bpe(texts, config.tokenizer.vocab_size, partial)
    give_name(partial, folder)
    say(f"trained a byte-level BPE of {len(load_tokenizer(folder)):,} tokens")


@contextmanager
def _alone(folder: Path, say: Callable[[str], None], check: Callable[[], None]) -> Iterator[None]:
    """Only one process makes what `folder` is to hold; a full disk is a sentence."""
    with ExitStack() as held:
        try:
            held.enter_context(turn(beside(folder), folder.name, say, check))
        except OSError as error:
            raise RunError(
                f"the data folder cannot be written: {error.strerror}", where=str(folder.parent), mend="set data.folder"
            ) from None
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                "no space left for the token table",
                where=str(folder.parent),
                mend="free some and start again: finished parts are kept",
                outcome=Outcome.NO_SPACE,
            ) from None


def _stem(path: str | list[str] | None) -> str:
    first = path if isinstance(path, str) else (path or ["table"])[0]
    stem = Path(first.split(",")[0].rstrip("/*")).stem or "table"
    return "".join(c if c.isalnum() else "-" for c in stem)[:32]
