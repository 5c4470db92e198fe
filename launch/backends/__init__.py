"""Places a run can go, one file each: the backends of `--on NAME`, and the contract that all of them keep.

A module in this folder that defines `Options` is a backend; its name is its file's name. It loads no torch, and at import
nothing that takes time (no pydantic, no yaml): `orthogon list` asks it for states. It offers:

`Options`: a frozen dataclass with `__pydantic_config__ = STRICT`. Its fields are the options of the backend, in a
cluster file (`--cluster FILE`, one key per field) and on the command line (`--nodes 4`, `--nodes=4`). Every field has a
default and a docstring. No field may be called `name`, `runs`, `seed`, `on`, `cluster` or like a section of the
configuration.

`submit(config, folder, options, *, resume, after=[]) -> dict`: start or queue the run whose folder exists, and return at
once with the handle: JSON values, enough to find it again from another process. The caller stores it in
`folder/handle.json`, with `backend` and `options` added. `resume` tells that the run was started before. `after` names runs
(in the same folder of runs) that must finish first, where the backend can wait for them; one that cannot raises.

`state(folder, handle) -> (word, detail)`: what became of the handle. The words: `pending` (queued; the detail says why it
waits), `running`, `ended` (the backend is done with it; what came of it says `logs/N/attempt.json` or `outcome.json`),
`vanished` (it is not there any more and has not ended in order), `unknown` (cannot be told now, e.g. the controller does not
answer). The detail is for people. It never raises, and takes no longer than some seconds.

`logs(folder, handle) -> list[Path]`: the log files of the newest attempt, ranks first; only files that exist.

`cancel(folder, handle, now) -> str`: ask for a save and an end, or with `now` end it at once; returns at once with a sentence
that says what was asked for. What has ended already gets a sentence, too.

`describe(config, folder, options) -> str`: what `--dry-run` prints: the script or the command. Writes nothing.

A backend may also offer `states(pairs) -> list[(word, detail)]` for many pairs of folder and handle at once, where asking
one by one is slow. Errors are `RunError`: a missing program or an unknown option is bad configuration (78), a controller that
does not answer infrastructure (69), a full disk no space (73).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from trainer import registry
from trainer.outcome import RunError

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.config import RunConfig

WORDS = ("pending", "running", "ended", "vanished", "unknown")


class Backend(Protocol):
    """The module of a backend; the docstring of this package says what each function promises."""

    Options: Any

    def submit(
        self, config: RunConfig, folder: Path, options: Any, *, resume: bool, after: list[str] = ...
    ) -> dict[str, Any]: ...
    def state(self, folder: Path, handle: dict[str, Any]) -> tuple[str, str]: ...
    def logs(self, folder: Path, handle: dict[str, Any]) -> list[Path]: ...
    def cancel(self, folder: Path, handle: dict[str, Any], now: bool) -> str: ...
    def describe(self, config: RunConfig, folder: Path, options: Any) -> str: ...


def names() -> list[str]:
    """The backends, found by their files; none of them is imported."""
    return registry.names(__name__)


def find(name: str) -> Backend:
    """The module of a backend.

    Raises:
        RunError: there is none of this name.
    """
    if name not in names():
        from trainer.yaml_source import nearest

        guess = nearest(name, names())
        mend = f"did you mean {guess}?" if guess else f"one of: {', '.join(names())}"
        raise RunError(f"there is no backend '{name}'", where="command line, --on", mend=mend)
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
