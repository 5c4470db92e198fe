"""Documents from the embedded corpus, text files and JSONL."""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import DataConfig
from trainer.outcome import RunError

EMBEDDED = "stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One document: where it came from, and its text."""

    name: str
    text: str


def documents(config: DataConfig, path: str | list[str]) -> Iterator[Document]:
    """The documents of `path`, in the order of sorted file names; empty ones are left out.

    Raises:
        RunError: nothing there, no text in it, text that is not UTF-8, or a bad JSONL line (file and line are named).
    """
    found = False
    every = files(path)
    root = os.path.commonpath([file.parent for file in every])
    for file in every:
        for document in _read(config, file, Path(os.path.relpath(file, root)).as_posix(), embedded=path == EMBEDDED):
            if document.text.strip():
                found = True
                yield document
    if not found:
        raise RunError(f"the corpus {path} holds no text", where="data.path", mend="point it at files with text")


def fingerprint(path: str | list[str]) -> list[Any]:
    """What tells without reading whether a corpus changed: names, sizes, times (or Python's version)."""
    if path == EMBEDDED:
        return [platform.python_version(), *((file.name, file.stat().st_size) for file in files(path))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files(path)]


def files(path: str | list[str]) -> list[Path]:
    """The files that a path, folder or glob (or a list of them) stands for, sorted."""
    if path == EMBEDDED:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [f for f in root.rglob("*.py") if not _LEFT_OUT & set(f.relative_to(root).parts)]
        return sorted(found, key=lambda f: f.relative_to(root).as_posix())
    every: set[Path] = set()
    for entry in [path] if isinstance(path, str) else path:
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


def _hidden(path: Path) -> bool:
    """Hidden files and folders, such as `.git`, are no text that anyone meant."""
    return any(part.startswith(".") for part in path.parts)


def _read(config: DataConfig, file: Path, name: str, *, embedded: bool) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _read_jsonl(config, file, name)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if embedded:
            return
        raise RunError(f"{file} is not UTF-8 at byte {error.start}", where=str(file), mend="convert it") from None
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}", where=str(file), mend="check the file") from None
    if embedded or config.documents == "file":
        yield Document(name, text)
        return
    pieces = re.split(r"\n\s*\n", text) if config.documents == "paragraph" else text.split("\n")
    for number, piece in enumerate(pieces):
        yield Document(f"{name}#{number}", piece)


def _read_jsonl(config: DataConfig, file: Path, name: str) -> Iterator[Document]:
    try:
        lines = open(file, "rb")
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}", where=str(file), mend="check the file") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise RunError("no valid JSON", where=where, mend="correct the line") from None
            text = record.get(config.text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else "no object"
                raise RunError(
                    f"no text under the key {config.text_key}",
                    where=where,
                    mend=f"set data.text_key (keys here: {keys})",
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RunError(
                    "the text has half a surrogate pair, which UTF-8 cannot hold", where=where, mend="correct the line"
                ) from None
            yield Document(f"{name}:{number}", text)
