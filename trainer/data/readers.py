"""Text and JSON lines, plain or compressed, read as a stream; and what a file is, by its name and by its first bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from trainer.config_data import SourceConfig
from trainer.outcome import RunError

TABLES = ("parquet", "arrow")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson")
# First bytes of files that are no text, whatever their names say. A zstd file may begin with a skippable frame.
_SIGNS = {
    "gzip": [b"\x1f\x8b"],
    "zstd": [b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))],
    "parquet": [b"PAR1"],
    "arrow": [b"ARROW1", b"\xff\xff\xff\xff"],
    "xz": [b"\xfd7zXZ\x00"],
    "zip": [b"PK\x03\x04"],
}


class Document(NamedTuple):
    """One document: where it came from, and its text."""

    name: str
    text: str


def form_of(file: Path) -> tuple[str, str | None]:
    """("text" | "lines" | "parquet" | "arrow", None | "gzip" | "zstd") as the file's name says.

    `.jsonl` and `.ndjson` are JSON lines, and so is compressed `.json`, as corpora use it; plain `.json` is text.

    Raises:
        RunError: the first bytes say otherwise.
    """
    codec = _CODECS.get(file.suffix)
    suffix = Path(file.stem).suffix if codec else file.suffix
    if suffix in (".parquet", ".arrow") and not codec:
        form = suffix[1:]
    else:
        form = "lines" if suffix in _LINES or (codec and suffix == ".json") else "text"
    named, found = codec or (form if form in TABLES else "text"), _sign(file)
    if suffix == ".tar" or found in ("xz", "zip"):
        raise RunError(
            f"{file} is an archive, or packed in a way that is not read",
            where=str(file),
            mend="unpack it, or pack it with gzip or zstd",
        )
    if named != found:
        is_what = {"text": "text", "": "empty"}.get(found, f"{found} data")
        says = {"text": "text", "lines": "JSON lines"}.get(form, form) + (f" in {codec}" if codec else "")
        right = {"gzip": ".gz", "zstd": ".zst", "parquet": ".parquet", "arrow": ".arrow"}.get(found)
        raise RunError(
            f"{file} is {is_what}, and its name says {says}",
            where=str(file),
            mend=f"let its name end in {right}" if right else "let its name say what it is, or make it again",
        )
    return form, codec


def read_text(source: SourceConfig, file: Path, codec: str | None, name: str, *, embedded: bool) -> Iterator[Document]:
    """The documents of a text file, as `source.documents` cuts it; paragraphs and lines without holding the file."""
    if embedded or source.documents == "file":
        with opened(file, codec) as stream:
            raw = stream.read()
        try:
            yield Document(name, _newlines(raw.decode()))
        except UnicodeDecodeError as error:
            if not embedded:
                raise _not_utf8(file, error.start) from None
        return
    number, paragraph = 0, []
    for line in _lines(file, codec):
        if source.documents == "line":
            yield Document(f"{name}#{number}", line)
            number += 1
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Document(f"{name}#{number}", "\n".join(paragraph))
            number, paragraph = number + 1, []
    yield Document(f"{name}#{number}", "\n".join(paragraph))


def read_lines(source: SourceConfig, file: Path, codec: str | None, name: str) -> Iterator[Document]:
    """The documents of JSON lines: one object per line, the text under `source.text_key`; null is no text."""
    with opened(file, codec) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise RunError("no valid JSON", where=where, mend="correct the line") from None
            text = record.get(source.text_key, 0) if isinstance(record, dict) else 0
            if text is not None and not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else "no object"
                raise no_text(source.text_key, where, f"keys here: {keys}")
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise RunError(
                    "the text has half a surrogate pair, which UTF-8 cannot hold", where=where, mend="correct the line"
                ) from None
            yield Document(f"{name}:{number}", text or "")


def no_text(key: str, where: str, there: str) -> RunError:
    """The error of a record without text."""
    return RunError(f"no text under the key {key}", where=where, mend=f"set data.text_key ({there})")


@contextmanager
def opened(file: Path, codec: str | None) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; whatever goes wrong while they are read is a sentence."""
    try:
        if codec is None:
            with open(file, "rb") as plain:
                yield plain
            return
        import pyarrow

        with io.BufferedReader(pyarrow.input_stream(str(file), compression=codec), 1 << 20) as stream:
            yield stream
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise RunError(
            f"{file} cannot be read: {reason}",
            where=str(file),
            mend="check the file"
            if codec is None
            else f"it is damaged or cut off: get it again (test it with {codec} -t)",
        ) from None


def _lines(file: Path, codec: str | None) -> Iterator[str]:
    """Lines without their ends, which may be those of any system."""
    with opened(file, codec) as stream:
        offset = 0
        for raw in stream:
            try:
                text = _newlines(raw.decode())
            except UnicodeDecodeError as error:
                raise _not_utf8(file, offset + error.start) from None
            offset += len(raw)
            yield from text.removesuffix("\n").split("\n")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _not_utf8(file: Path, byte: int) -> RunError:
    return RunError(f"{file} is not UTF-8 at byte {byte}", where=str(file), mend="convert it")


def _sign(file: Path) -> str:
    """What the first bytes say: a compression, a table format, "text" for all else, "" for an empty file."""
    try:
        with open(file, "rb") as stream:
            first = stream.read(8)
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}", where=str(file), mend="check the file") from None
    for sign, beginnings in _SIGNS.items():
        if any(first.startswith(beginning) for beginning in beginnings):
            return sign
    return "text" if first or not _CODECS.get(file.suffix, file.suffix in (".parquet", ".arrow")) else ""
