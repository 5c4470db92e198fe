"""The folder of a run: what lies where, who makes it, and its attempts. Imports no torch, and the configuration (0.2 s) only
where it is needed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import Lines, digest, read_json, write_json, write_text
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig


def create(
    config: RunConfig,
    command: list[str],
    lineage: dict[str, Any] | None = None,
    fill: Callable[[Path], None] = lambda partial: None,
) -> Path:
    """Make the folder of a new run with `config.yaml` and `run.json`.

    The folder comes into being whole, by a rename: whoever looks meanwhile sees no run, and a kill leaves none by halves.

    Args:
        lineage: the run and the checkpoint that it starts from, if it does.
        fill: puts into the folder, before it has its name, what the run needs besides.

    Raises:
        RunError: a run of this name exists, the folder cannot be written, or what the run starts from is not there.
    """
    from trainer import config as configuration

    folder, source = config.folder, config.model.init_from
    if source is not None and not Path(source).is_dir():
        raise RunError(
            f"there is no folder {source}",
            where="model.init_from",
            mend="give a folder of weights, a run or a checkpoint",
        )
    partial = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
    try:
        if folder.exists():
            raise _taken(folder)
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"the run folder cannot be made: {error.strerror}",
            where=str(folder),
            mend="choose another with --runs=FOLDER",
            outcome=Outcome.NO_SPACE if no_space(error) else Outcome.BAD_CONFIGURATION,
        ) from None
    try:
        for name in ("logs", "checkpoints", "figures"):
            (partial / name).mkdir()
        record = {
            "name": config.name,
            "created": time.time(),
            "config_digest": digest(configuration.resolved(config)),
            "git_commit": _git_commit(),
            "command": command,
            "python": platform.python_version(),
            "versions": versions(),
            "lineage": lineage or {},
        }
        write_json(partial / "run.json", record)
        write_config(partial, config)
        fill(partial)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if folder.exists():  # another process was quicker
            raise _taken(folder) from None
        raise RunError(
            f"the run folder cannot be written: {error.strerror}",
            where=str(folder),
            mend="make room, or choose another with --runs=FOLDER",
            outcome=Outcome.of_errno(error.errno),
        ) from None
    return folder


def _taken(folder: Path) -> RunError:
    """Something of this name is there already."""
    if (folder / "config.yaml").exists():
        what = f"there is a run {folder.name} already"
        mend = f"go on with `orthogon resume {folder.name}`, or choose another name with --name=..."
    else:
        what = f"there is a {'folder' if folder.is_dir() else 'file'} {folder.name} already, and it is no run"
        mend = "remove it, or choose another name with --name=..."
    return RunError(what, where=str(folder), mend=mend)


def no_space(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return Outcome.of_errno(error.errno) is Outcome.NO_SPACE


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved configuration."""
    import yaml

    from trainer import config as configuration

    text = yaml.safe_dump(configuration.resolved(config), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", text)


def check(folder: Path) -> None:
    """There is a run in the folder.

    Raises:
        RunError: there is none; names those beside it.
    """
    if not (folder / "config.yaml").exists():
        siblings = sorted(p.name for p in folder.parent.glob("[!.]*") if (p / "config.yaml").exists())
        raise RunError(
            f"there is no run {folder.name}",
            where=str(folder.parent),
            mend=f"runs there: {', '.join(siblings)}" if siblings else "check the name, or give --runs=FOLDER",
        )


def open_run(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of an existing run, with overrides that a resume allows.

    Raises:
        RunError: there is no such run, or an override changes what the run is.
    """
    from trainer import config as configuration

    check(folder)
    plain = configuration.load(folder / "config.yaml")
    if not overrides:
        return plain
    config = configuration.load(folder / "config.yaml", overrides)
    configuration.check_resume(configuration.resolved(plain), configuration.resolved(config))
    return config


def read_record(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        RunError: it cannot be read.
    """
    try:
        record: dict[str, Any] = read_json(folder / "run.json")
    except (OSError, ValueError) as error:
        raise RunError(f"run.json cannot be read: {error}", where=str(folder), mend="restore the file") from None
    return record


def new_attempt(folder: Path) -> int:
    """Make `logs/N/` for the next attempt and return N."""
    numbers = [int(p.name) for p in (folder / "logs").iterdir() if p.name.isdigit()]
    number = max(numbers, default=0) + 1
    try:
        (folder / "logs" / str(number)).mkdir()
    except FileExistsError:
        raise RunError(
            f"another process starts an attempt of {folder.name}", where=str(folder), mend="wait for it"
        ) from None
    except OSError as error:
        raise RunError(
            f"the run folder cannot be written: {error.strerror}",
            where=str(folder),
            mend="make it writable",
            outcome=Outcome.INFRASTRUCTURE,
        ) from None
    return number


def record_event(folder: Path, kind: str, **facts: Any) -> None:
    """Append to `events.jsonl`, durably; while the disk is full the event waits in memory."""
    lines = Lines(folder / "events.jsonl", durable=True)
    lines.write(json.dumps({"time": time.time(), "event": kind, **facts}))
    lines.close()


def events(folder: Path) -> list[dict[str, Any]]:
    """The events so far; a torn last line is left out."""
    path = folder / "events.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    names = ("orthogon", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of this program: told by the image it runs from, or by git."""
    if os.environ.get("ORTHOGON_COMMIT"):
        return os.environ["ORTHOGON_COMMIT"]
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def command_line() -> list[str]:
    """The command as it was typed."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
