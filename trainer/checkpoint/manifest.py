"""The manifest of a checkpoint, and what it takes to believe one. Imports no torch.

A generation is a folder `step-00000200` whose `manifest.json` lists every file with size and SHA-256. It is written last,
so that a folder without a right manifest is not a checkpoint. Verification fails closed: what is not listed, or listed
and not there, is damage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.files import digest, fsync_file, fsync_folder, json_text, sha256_file, write_json, write_text
from trainer.outcome import Outcome, RunError

FORMAT = 1
FILE = "manifest.json"
_NAME = re.compile(r"step-\d{8,}")


class Damaged(Exception):
    """A checkpoint is not what its manifest says."""

    def __init__(self, file: str, expected: str, found: str) -> None:
        super().__init__(file, expected, found)
        self.file, self.expected, self.found = file, expected, found

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint that is no tensor."""

    step: int
    position: int
    """Sequences consumed so far: the one number that says where in the data the run is."""
    world_size: int
    files: dict[str, dict[str, Any]]
    """Per file: size in bytes and sha256."""
    tensors: dict[str, dict[str, Any]]
    """Per tensor: global shape and dtype."""
    config: dict[str, Any]
    """The run's resolved configuration at the save."""
    state: dict[str, Any]
    """Optimizer groups, counters, skipped windows, identity of the data, and whether it counts as good."""
    versions: dict[str, str] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    format: int = FORMAT

    @property
    def good(self) -> bool:
        """Not saved in the middle of a streak of skipped steps: worth going back to."""
        return self.state.get("good") is not False


def name(step: int) -> str:
    """The folder name of the generation of a step."""
    return f"step-{step:08d}"


def generations(checkpoints: Path) -> list[Path]:
    """Finished generations, newest first; temporary and quarantined folders do not count."""
    if not checkpoints.exists():
        return []
    return sorted(
        (p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of, reverse=True
    )


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with a digest of itself, durably."""
    content = asdict(manifest)
    write_json(folder / FILE, {"manifest": content, "sha256": digest(content)})


def read(folder: Path) -> Manifest:
    """The manifest of a generation.

    Raises:
        Damaged: it is missing, unreadable, not byte for byte what `write` makes of its content, does not match its own
            digest, or belongs to the generation of another step.
    """
    path = folder / FILE
    try:
        check_regular(folder, FILE)
        text = path.read_bytes().decode()
        record = json.loads(text)
        content, expected = record["manifest"], record["sha256"]
        found, exact = digest(content), json_text(record) == text
    except FileNotFoundError:
        raise Damaged(FILE, "a manifest", "none") from None
    except OSError as error:
        raise Damaged(FILE, "a readable manifest", str(error.strerror)) from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damaged(FILE, "a readable manifest", type(error).__name__) from None
    if found != expected:
        raise Damaged(FILE, f"sha256 {expected}", f"sha256 {found}")
    if not exact:
        raise Damaged(FILE, "the text as it was written", "another text of the same content")
    if content.get("format") != FORMAT:
        raise Damaged(FILE, f"format {FORMAT}", f"format {content.get('format')}")
    if _NAME.fullmatch(folder.name) and step_of(folder) != content["step"]:
        raise Damaged(FILE, f"the manifest of step {step_of(folder)}", f"that of step {content['step']}")
    return Manifest(**content)


def check_names(folder: Path, manifest: Manifest) -> None:
    """The folder holds the listed files and nothing else, no folder either."""
    there = {str(p.relative_to(folder)) for p in folder.rglob("*")} - {FILE}
    for extra in sorted(there - manifest.files.keys()):
        raise Damaged(extra, "nothing of this name", "a file or folder")
    for missing in sorted(manifest.files.keys() - there):
        raise Damaged(missing, "a file", "none")


def check_regular(folder: Path, file: str) -> None:
    """A file of a generation is a file, not a link to something that may change."""
    mode = (folder / file).lstat().st_mode
    if not stat.S_ISREG(mode):
        raise Damaged(file, "a regular file", "a symbolic link" if stat.S_ISLNK(mode) else "something else")


def check_file(folder: Path, manifest: Manifest, file: str) -> None:
    """Size and SHA-256 of one file are as listed."""
    expected = manifest.files[file]
    try:
        check_regular(folder, file)
        size = (folder / file).stat().st_size
        if size != expected["size"]:
            raise Damaged(file, f"{expected['size']} bytes", f"{size} bytes")
        found = sha256_file(folder / file)
    except OSError as error:
        raise Damaged(file, "a readable file", str(error.strerror)) from None
    if found != expected["sha256"]:
        raise Damaged(file, f"sha256 {expected['sha256']}", f"sha256 {found}")


def verify(folder: Path) -> Manifest:
    """Read the manifest and check every file of the generation.

    Raises:
        Damaged: the first thing that is not as listed.
    """
    manifest = read(folder)
    check_names(folder, manifest)
    for file in manifest.files:
        check_file(folder, manifest, file)
    return manifest


def find(run: Path, step: int | None = None) -> Path:
    """The generation of a step of the run in `run`, or the newest; not verified.

    Raises:
        RunError: there is none.
    """
    known = generations(run / "checkpoints")
    if not known:
        raise RunError(f"run {run.name} has no checkpoint", where=str(run), mend=f"orthogon resume {run.name}")
    folder = known[0] if step is None else run / "checkpoints" / name(step)
    if folder not in known:
        steps = ", ".join(str(step_of(path)) for path in reversed(known))
        raise RunError(
            f"run {run.name} has no checkpoint of step {step}", where=str(run / "checkpoints"), mend=f"steps: {steps}"
        )
    return folder


def pick(run: Path, step: int | None = None) -> tuple[Path, Manifest]:
    """The verified generation of a step of the run in `run`, or the newest; unlike a resume it moves nothing.

    Raises:
        RunError: there is none, or it is damaged: then a tool does not take another one by itself.
    """
    folder = find(run, step)
    try:
        return folder, verify(folder)
    except Damaged as damage:
        known = generations(folder.parent)
        others = ", ".join(str(step_of(path)) for path in reversed(known) if path != folder) or "none"
        raise RunError(
            f"{folder.name} is damaged: {damage}",
            where=str(folder),
            mend=f"name another step (there are: {others}); a resume moves the damaged one aside",
            outcome=Outcome.INFRASTRUCTURE,
        ) from None


def step_of(folder: Path) -> int:
    """The step of a generation, from its folder name."""
    return int(folder.name.removeprefix("step-"))


def lineage(run: Path, manifest: Manifest) -> dict[str, Any]:
    """What a run that starts from a checkpoint of another remembers of it."""
    return {
        "run": run.name,
        "checkpoint": name(manifest.step),
        "position": manifest.position,
        "manifest_sha256": digest(asdict(manifest)),
    }


def copy(folder: Path, manifest: Manifest, checkpoints: Path) -> str:
    """Give another run a verified generation, complete or not at all; says whether its files are links or copies.

    A generation never changes, so that two runs can share its files: removing one name leaves the other.

    Raises:
        RunError: the files vanished or changed meanwhile.
    """
    final = checkpoints / folder.name
    partial = checkpoints / f"{folder.name}.tmp-copy"
    partial.mkdir()
    how = "linked"
    try:
        for file in manifest.files:
            try:
                os.link(folder / file, partial / file)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without links
                how = "copied"
                shutil.copyfile(folder / file, partial / file)
                fsync_file(partial / file)
                check_file(partial, manifest, file)
    except (Damaged, OSError) as error:
        raise RunError(
            f"{folder.name} could not be copied: {error}",
            where=str(folder),
            mend="take a checkpoint that the source keeps (checkpoint.keep), and mind the space",
            outcome=Outcome.INFRASTRUCTURE,
        ) from None
    write(partial, manifest)
    fsync_folder(partial)
    partial.rename(final)
    fsync_folder(checkpoints)
    return how


def quarantine(folder: Path, reason: str) -> Path:
    """Move a bad generation to `quarantine/` beside it, with the reason where it can be written; returns its new place.

    Raises:
        OSError: it cannot be moved.
    """
    home = folder.parent / "quarantine"
    home.mkdir(exist_ok=True)
    target, number = home / folder.name, 1
    while target.exists():
        number += 1
        target = home / f"{folder.name}-{number}"
    folder.rename(target)
    with suppress(OSError):  # the disk may be full
        write_text(target / "reason.txt", reason + "\n")
        fsync_folder(folder.parent)
    return target


def remove(folder: Path) -> None:
    """Delete a generation; the manifest goes first, so that a half-deleted one is never taken for a checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
    fsync_folder(folder.parent)
