"""Documents of a source: the embedded corpus, files of text, JSON lines and tables, datasets of the hub."""

from __future__ import annotations

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config_data import SourceConfig, parse_hub
from trainer.data.readers import TABLES, Document, form_of, read_lines, read_text
from trainer.data.records import pin, read_hub, read_table
from trainer.outcome import RunError

EMBEDDED = "stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(source: SourceConfig, path: str | list[str]) -> Iterator[Document]:
    """The documents of `path`: those of files in the order of their sorted names, then those of hub names as listed.

    They come one after another: memory holds one document (of a table: one batch of rows), never a file of many. Empty
    ones are left out.

    Raises:
        RunError: nothing there, no text in it, text that is not UTF-8, a bad record (file and line or row are named), a
            file that is not what its name says, a damaged one, a hub that does not answer.
    """
    found = False
    for document in _every(source, path):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise RunError(f"the corpus {path} holds no text", where="data.path", mend="point it at files with text")


def fingerprint(path: str | list[str]) -> list[Any]:
    """What tells without reading whether a corpus changed: names, sizes, times (or Python's version).

    A name on the hub is its own fingerprint, so that a table is found again where there is no network.
    """
    if path == EMBEDDED:
        return [platform.python_version(), *((file.name, file.stat().st_size) for file in files(path))]
    names = [entry for entry in _entries(path) if parse_hub(entry)]
    folders = [str(Path(hub.name).expanduser()) for name in names if (hub := parse_hub(name)) and hub.local]
    every = _all_files(_plain(path) + folders)
    return [*names, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in every)]


def pinned(path: str | list[str] | None) -> str | list[str] | None:
    """The path with every name on the hub fixed to the commit that it means now; asks the hub."""
    if path is None or path == EMBEDDED:
        return path
    entries = [str(pin(hub)) if (hub := parse_hub(entry)) else entry for entry in _entries(path)]
    return entries[0] if isinstance(path, str) else entries


def files(path: str | list[str]) -> list[Path]:
    """The files that a path, folder or glob (or a list of them) stands for, sorted; hub names are none.

    Raises:
        RunError: there is none, or a folder holds tables and other files, of which only one kind can be meant.
    """
    if path == EMBEDDED:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [f for f in root.rglob("*.py") if not _LEFT_OUT & set(f.relative_to(root).parts)]
        return sorted(found, key=lambda f: f.relative_to(root).as_posix())
    for entry in _plain(path):
        if Path(entry).is_dir():
            _check_folder(entry)
    return _all_files(_plain(path))


def _every(source: SourceConfig, path: str | list[str]) -> Iterator[Document]:
    every = files(path)
    root = os.path.commonpath([file.parent for file in every]) if every else ""
    for file in every:
        name = Path(os.path.relpath(file, root)).as_posix()
        form, codec = form_of(file)
        if form in TABLES:
            yield from read_table(source, file, form, name)
        elif form == "lines":
            yield from read_lines(source, file, codec, name)
        else:
            yield from read_text(source, file, codec, name, embedded=path == EMBEDDED)
    for entry in [] if path == EMBEDDED else _entries(path):
        hub = parse_hub(entry)
        if hub:
            yield from read_hub(source, hub)


def _all_files(entries: list[str]) -> list[Path]:
    every: set[Path] = set()
    for entry in entries:
        here = Path(entry)
        if here.is_dir():
            matches = [f for f in here.rglob("*") if f.is_file() and not _hidden(f.relative_to(here))]
        elif here.is_file():
            matches = [here]
        else:
            matches = [Path(match) for match in glob.glob(entry, recursive=True) if Path(match).is_file()]
        if not matches:
            raise RunError(f"there is no text at {entry}", where="data.path", mend="check the path, folder or glob")
        every.update(matches)
    return sorted(every)


def _check_folder(entry: str) -> None:
    """A dataset's card and its bookkeeping are no text that anyone meant to train on."""
    tables = [f for f in _all_files([entry]) if f.suffix in (".parquet", ".arrow")]
    others = [f for f in _all_files([entry]) if f not in tables]
    if tables and others:
        raise RunError(
            f"the folder {entry} holds tables ({tables[0].name}) and other files ({others[0].name})",
            where="data.path",
            mend=f"give a glob such as {entry.rstrip('/')}/**/*{tables[0].suffix}, or hub:{_as_local(entry)} for a dataset",
        )


def _as_local(entry: str) -> str:
    return entry if entry[:1] in "./~" else f"./{entry}"


def _entries(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def _plain(path: str | list[str]) -> list[str]:
    return [entry for entry in _entries(path) if parse_hub(entry) is None]


def _hidden(path: Path) -> bool:
    """Hidden files and folders, such as `.git`, are no text that anyone meant."""
    return any(part.startswith(".") for part in path.parts)
