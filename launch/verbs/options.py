"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from trainer.checkpoint import manifest as manifests
from trainer.outcome import RunError

RunName = Annotated[Positional[str], arg(metavar="RUN", help="The run's name.")]
Runs = Annotated[Path, arg(help="The folder of the run folders.")]
Step = Annotated[int | None, arg(help="The step of the checkpoint; none takes the newest.")]
Export = Annotated[Path | None, arg(help="Take the weights of this export instead of a checkpoint's.")]
Restarts = Annotated[
    int, arg(help="Restarts in a row that may pass without a newer checkpoint; 0 makes one attempt only.")
]
On = Annotated[
    str | None,
    arg(
        metavar="BACKEND", help="Where it runs; by default where the cluster file says, else torchrun on this machine."
    ),
]
Cluster = Annotated[
    str | None,
    arg(
        metavar="NAME|FILE",
        help="A file of configs/clusters/, by its name, or another YAML file: options of the backend.",
    ),
]
Json = Annotated[bool, arg(help="Print JSON, for programs.")]


def weights(folder: Path, step: int | None, export: Path | None) -> list[str]:
    """`step` and `export` as options of a task; what is not there is told before torch is loaded.

    Raises:
        RunError: there is no such checkpoint or export, or both are named.
    """
    if export is None:
        manifests.find(folder, step)
    elif step is not None:
        raise RunError("--step and --export name two models", where="command line", mend="leave one of them out")
    elif not (export / "config.json").exists():
        raise RunError(
            f"there is no export in {export}",
            where="command line, --export",
            mend="give a folder that `orthogon checkpoint export` or `average` wrote",
        )
    return [*([f"--step={step}"] if step is not None else []), *([f"--export={export}"] if export is not None else [])]
