"""What a synthetic table is made of, and where it lies. Imports no torch.

The table has its name only once it is whole; meanwhile its parts lie in `NAME.partial`, beside the recipe that they follow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint import manifest as manifests
from trainer.ensemble import manifest
from trainer.ensemble.manifest import Ensemble, Member
from trainer.files import digest, read_json, write_json
from trainer.lock import beside, turn
from trainer.outcome import Outcome, RunError

FORMAT = 1
FILE = "recipe.json"
POOL, JOINT = "pool", "joint"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the content of a synthetic table follows from."""

    teacher: str
    """The ensemble, or the run."""
    mode: str
    """`pool`: batch b is of member b mod K. `joint`: every token is of the ensemble. A run's name: all is of this one."""
    rule: str
    """Of `joint`: how the members' logits become one."""
    members: tuple[Member, ...]
    """Those that decode, in order."""
    tokenizer_sha256: str
    vocab_size: int
    sequence_length: int
    document_masking: bool
    sequences: int
    batch: int
    """Sequences that are decoded together: their last bits depend on it."""
    seed: int
    temperature: float
    top_k: int | None
    top_p: float
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Digest of all this."""
        return digest(asdict(self))

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


def teacher_of(runs: Path, name: str) -> Ensemble:
    """The ensemble of a name, or a run of this name as an ensemble of one.

    Raises:
        RunError: there is neither, or both; or the run's newest checkpoint is corrupt.
    """
    run = (runs / name / "config.yaml").exists()
    if not (manifest.folder_of(runs, name) / manifest.FILE).exists():
        if run:
            return manifest.make(name, runs, [name], manifest.RULES[0])
        raise RunError(
            f"there is no ensemble and no run {name}", where=str(runs), mend="check the name, or give --runs=FOLDER"
        )
    if run:
        raise RunError(
            f"{name} is the name of an ensemble and of a run",
            where=str(runs),
            mend="name a member's run, or rename one",
        )
    return manifest.read(runs, name)


def chosen(teacher: Ensemble, mode: str) -> Ensemble:
    """The part of the teacher that decodes: all members, or the one that `mode` names.

    Raises:
        RunError: it is no mode, and no member has this name.
    """
    if mode in (POOL, JOINT):
        return teacher
    found = tuple(member for member in teacher.members if member.run == mode)
    if not found:
        names = ", ".join(member.run for member in teacher.members)
        raise RunError(
            f"{mode} is no member of {teacher.name}",
            where="command line, --mode",
            mend=f"pool, joint, or one of: {names}",
        )
    return replace(teacher, members=found)


def config_of(runs: Path, member: Member) -> dict[str, Any]:
    """The configuration that a member's checkpoint was saved with.

    Raises:
        RunError: the run or the checkpoint is not there, or its manifest is damaged.
    """
    path = manifests.find(runs / member.run, member.step)
    try:
        return manifests.read(path).config
    except manifests.Damaged as damage:
        raise RunError(
            f"member {member.run} is corrupt: {path.name}: {damage}",
            where=str(path),
            mend=f"orthogon resume {member.run} moves a damaged checkpoint aside; then make the ensemble again",
        ) from None


def recipe(
    runs: Path, teacher: Ensemble, mode: str, *, tokens: int, batch: int, seed: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0,
) -> Recipe:  # fmt: skip
    """The recipe of so many tokens of a teacher, rounded up to whole sequences.

    Raises:
        RunError: as `chosen` and `config_of`; or a number is out of its range.
    """
    for name, value, good, must in (
        ("tokens", tokens, tokens > 0, "above 0"),
        ("batch", batch, batch > 0, "above 0"),
        ("seed", seed, seed >= 0, "0 or above"),
        ("temperature", temperature, temperature >= 0, "0 or above"),
        ("top-k", top_k, top_k is None or top_k > 0, "above 0"),
        ("top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not good:
            raise RunError(f"--{name} is {value}", where="command line", mend=f"it must be {must}")
    part = chosen(teacher, mode)
    data = config_of(runs, part.members[0])["data"]
    return Recipe(
        teacher=teacher.name, mode=mode, rule=teacher.rule, members=part.members,
        tokenizer_sha256=teacher.tokenizer_sha256, vocab_size=teacher.vocab_size,
        sequence_length=data["sequence_length"], document_masking=data["document_masking"],
        sequences=math.ceil(tokens / data["sequence_length"]), batch=batch, seed=seed, temperature=temperature,
        top_k=top_k, top_p=top_p,
    )  # fmt: skip


def read(path: Path) -> Recipe:
    """The recipe in a file that `begin` wrote, or in a finished `table.json`.

    Raises:
        RunError: it is not there, or no recipe.
    """
    try:
        raw = read_json(path)
        raw = raw["synthetic"]["recipe"] if "synthetic" in raw else raw
        return Recipe(**{**raw, "members": tuple(Member(**member) for member in raw["members"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the recipe of a synthetic table cannot be read: {error}", where=str(path), mend="remove the folder"
        ) from None


def partial(folder: Path) -> Path:
    """Where the parts of a table lie until it is whole."""
    return folder.with_name(folder.name + ".partial")


def begun(folder: Path) -> Recipe:
    """The recipe of a table that was begun, or that another process has finished meanwhile.

    Raises:
        RunError: as `read`.
    """
    try:
        return read(partial(folder) / FILE)
    except RunError:
        if not (folder / "table.json").exists():
            raise
        return read(folder / "table.json")


def statistics(folder: Path) -> dict[str, Any]:
    """What a finished table says of itself: its folder, and figures of its text."""
    found: dict[str, Any] = read_json(folder / "table.json")["synthetic"]["statistics"]
    return {"table": str(folder), **found}


def finished(folder: Path, wanted: Recipe) -> bool:
    """Whether the table is there, made by this recipe.

    Raises:
        RunError: something else is there.
    """
    if not folder.exists():
        return False
    if not (folder / "table.json").exists():
        raise RunError(f"{folder} is there, and is no token table", where=str(folder), mend="choose another folder")
    _same(read(folder / "table.json"), wanted, folder)
    return True


def begin(folder: Path, wanted: Recipe) -> bool:
    """Make the folder of the parts with the recipe, or find it again; another process that makes the table is waited for.

    Returns:
        Whether something is left to make.

    Raises:
        RunError: parts or a table of another recipe are there, or the disk refuses.
    """
    work = partial(folder)
    try:
        with turn(beside(folder), str(folder), lambda text: print(text, file=sys.stderr)):
            if finished(folder, wanted):
                return False
            if (work / FILE).exists():
                _same(read(work / FILE), wanted, work)
            else:
                work.mkdir(parents=True, exist_ok=True)
                write_json(work / FILE, asdict(wanted))
            return True
    except OSError as error:
        raise RunError(
            f"the table's folder cannot be written: {error.strerror}", where=str(work),
            mend="make room, or choose another folder", outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip


def _same(before: Recipe, wanted: Recipe, folder: Path) -> None:
    if before == wanted:
        return
    told = [
        f"{name} {_short(was)}, now {_short(now)}"
        for name, was in vars(before).items()
        if (now := getattr(wanted, name)) != was
    ]
    raise RunError(
        f"{folder} was made with other settings: {'; '.join(told)}",
        where=str(folder),
        mend="give those again, choose another folder, or remove it",
    )


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(f"{one.run} step {one.step} ({one.manifest_sha256[:8]})" for one in value)
    return str(value)[:64]
