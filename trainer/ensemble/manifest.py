"""`RUNS/ensembles/NAME/ensemble.json`: which checkpoints of which runs are one ensemble. Imports no torch.

Members differ in the seeds of weights and order and agree in all that makes their logits comparable: tokenizer, real and
padded vocabulary, architecture, and the text that they were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from trainer.checkpoint import contents
from trainer.checkpoint import manifest as manifests
from trainer.files import digest, read_json, write_json
from trainer.outcome import Outcome, RunError

FORMAT = 1
FILE = "ensemble.json"
RULES = ("logit mean", "probability mean")
"""softmax(mean_k z_k), the normalized geometric mean of the members' distributions; and mean_k softmax(z_k)."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One checkpoint of one run."""

    run: str
    step: int
    position: int
    """Sequences that it was trained on."""
    seed: int
    order_seed: int
    manifest_sha256: str
    """Of the checkpoint's manifest, which lists the digest of every file."""
    weights_sha256: str
    """Of the stored weights alone: equal for checkpoints of equal weights, whatever else differs."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Members and what they agree in."""

    name: str
    rule: str
    """One of `RULES`: how the ensemble answers where one answer is asked for."""
    members: tuple[Member, ...]
    tokenizer_sha256: str
    vocab_size: int
    """Tokens of the tokenizer."""
    padded_vocab_size: int
    """Logits of the model; those beyond `vocab_size` belong to no token and are left out."""
    subset_sha256: str
    """Of the identity of the training text: tables, subsets and their seeds."""
    format: int = FORMAT


def folder_of(runs: Path, name: str) -> Path:
    """Where an ensemble lies.

    Raises:
        RunError: it is no name.
    """
    if Path(name).name != name or not name[:1].isalnum():
        raise RunError(
            f"'{name}' is no name of an ensemble", where="command line", mend="use letters, digits, '.', '_', '-'"
        )
    return runs / "ensembles" / name


def make(name: str, runs: Path, members: Sequence[str], rule: str) -> Ensemble:
    """The ensemble of the newest checkpoints of these runs, every one verified.

    Raises:
        RunError: there is no member, one is missing or corrupt, two are the same, or they differ in more than seeds.
    """
    if not members:
        raise RunError("an ensemble needs one member at least", where="command line", mend="name its runs")
    found = [_examine(runs / member) for member in members]
    for (one, _), (other, _) in combinations(found, 2):
        _refuse_twins(one, other)
    first, facts = found[0]
    for other, others in found[1:]:
        for key, value in others.items():
            if value != facts[key]:
                told = f" ({facts[key]} and {value})" if isinstance(value, int) else ""
                raise RunError(
                    f"members {first.run} and {other.run} have different {key.replace('_', ' ')}{told}",
                    where=f"{runs / first.run}, {runs / other.run}",
                    mend="the members of an ensemble differ in their seeds only",
                )
    return Ensemble(
        name=name, rule=rule, members=tuple(member for member, _ in found), tokenizer_sha256=facts["tokenizers"],
        vocab_size=facts["vocabularies"], padded_vocab_size=facts["padded_vocabularies"],
        subset_sha256=facts["training_subsets"],
    )  # fmt: skip


def write(runs: Path, ensemble: Ensemble) -> Path:
    """Write `ensemble.json`; returns its path. The same ensemble may be written again, another one not over it.

    Raises:
        RunError: there is another ensemble of this name, one that is no part of this one; or the disk refuses.
    """
    path = folder_of(runs, ensemble.name) / FILE
    if path.exists():
        before = read(runs, ensemble.name)
        if before.rule != ensemble.rule or not {m.run for m in before.members} <= {m.run for m in ensemble.members}:
            raise RunError(
                f"there is another ensemble {ensemble.name} already: {before.rule} of {', '.join(m.run for m in before.members)}",
                where=str(path),
                mend="remove it, or choose another name",
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(ensemble))
    except OSError as error:
        raise RunError(
            f"the ensemble cannot be written: {error.strerror}", where=str(path), mend="make room, or make it writable",
            outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip
    return path


def read(runs: Path, name: str) -> Ensemble:
    """The ensemble of a name.

    Raises:
        RunError: there is none, or its file is not what `write` makes.
    """
    path = folder_of(runs, name) / FILE
    if not path.exists():
        raise RunError(
            f"there is no ensemble {name}", where=str(path), mend="orthogon ensemble train, or orthogon ensemble make"
        )
    try:
        raw: dict[str, Any] = read_json(path)
        if raw["format"] != FORMAT or raw["rule"] not in RULES or not raw["members"]:
            raise ValueError("unknown format or rule, or no member")
        return of_json(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the ensemble cannot be read: {error}", where=str(path), mend="make it again: orthogon ensemble make"
        ) from None


def of_json(raw: dict[str, Any]) -> Ensemble:
    """The ensemble that `asdict` made these values of."""
    return Ensemble(**{**raw, "members": tuple(Member(**member) for member in raw["members"])})


def open_members(runs: Path, ensemble: Ensemble) -> list[tuple[Path, manifests.Manifest]]:
    """The members' checkpoints, verified anew, in order.

    Raises:
        RunError: one is missing, corrupt, or not the one that the ensemble was made of.
    """
    found = []
    for member in ensemble.members:
        path, manifest = _verified(runs / member.run, member.step)
        if digest(asdict(manifest)) != member.manifest_sha256:
            raise RunError(
                f"member {member.run} has another {path.name} than the ensemble was made of",
                where=str(path),
                mend=f"make the ensemble again: orthogon ensemble make {ensemble.name}",
            )
        found.append((path, manifest))
    return found


def _examine(run: Path) -> tuple[Member, dict[str, Any]]:
    """A run's newest checkpoint as a member, and what all members must agree in."""
    path, manifest = _verified(run)
    state, parts = manifest.state, contents.digests(path)
    member = Member(
        run=run.name, step=manifest.step, position=manifest.position, seed=manifest.config["seed"],
        order_seed=manifest.config["data"]["order_seed"], manifest_sha256=digest(asdict(manifest)),
        weights_sha256=digest({name: value for name, value in parts.items() if name.partition(": ")[2].startswith("model.")}),
    )  # fmt: skip
    return member, {
        "tokenizers": state["data"]["tokenizer"],
        "vocabularies": _vocabulary(run),
        "padded_vocabularies": state["architecture"]["vocab_size"],
        "architectures": state["architecture"],
        "training_subsets": digest(state["data"]["sources"]),
    }


def _verified(run: Path, step: int | None = None) -> tuple[Path, manifests.Manifest]:
    if not (run / "config.yaml").exists():
        raise RunError(
            f"member {run.name} is missing: there is no such run", where=str(run), mend="check names and --runs"
        )
    path = manifests.find(run, step)
    try:
        return path, manifests.verify(path)
    except manifests.Damaged as damage:
        raise RunError(
            f"member {run.name} is corrupt: {path.name}: {damage}",
            where=str(path),
            mend=f"orthogon resume {run.name} moves a damaged checkpoint aside; then make the ensemble again",
        ) from None


def _vocabulary(run: Path) -> int:
    """Tokens of the run's tokenizer, added ones too."""
    path = run / "tokenizer" / "tokenizer.json"
    try:
        raw = read_json(path)
        vocabulary = raw["model"]["vocab"]
        words = set(vocabulary) if isinstance(vocabulary, dict) else {word for word, _ in vocabulary}
        return len(words | {token["content"] for token in raw["added_tokens"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the tokenizer of member {run.name} cannot be read: {error}", where=str(path), mend="resume the run once"
        ) from None


def _refuse_twins(one: Member, other: Member) -> None:
    pair = f"{one.run} and {other.run}" if one.run != other.run else f"{one.run}, named twice,"
    if (one.seed, one.order_seed) == (other.seed, other.order_seed):
        why = f"have the same seeds (seed {one.seed}, data.order_seed {one.order_seed})"
    elif one.weights_sha256 == other.weights_sha256:
        why = "have equal weights"
    else:
        return
    raise RunError(
        f"members {pair} {why}: they are one model",
        where=one.run,
        mend="train members with `orthogon ensemble train`, which gives each seeds of its own",
    )
