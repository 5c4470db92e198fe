"""What of the submitter's environment a job gets: a file that only its owner can read.

`sbatch --export=ALL`, the default, puts the whole environment, passwords included, into Slurm's records. Here the job starts
from nothing (`--export=NONE`) and reads this file, which lies in the run folder with mode 0600.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.process import ROOT

FILE = "slurm.env"
TAKEN = re.compile(
    r"(PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|VIRTUAL_ENV|LD_LIBRARY_PATH|SSL_CERT_FILE|https?_proxy|no_proxy|"
    r"(CUDA|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|OMP|MKL|HF|TRANSFORMERS|TOKENIZERS|WANDB|MLFLOW|"
    r"ORTHOGON|XDG|PYTHON|FI|UCX|CONDA)_\w+|PYTHONPATH|PYTHONUNBUFFERED)",
    re.IGNORECASE,
)
LEFT = re.compile(r"CUDA_VISIBLE_DEVICES|XDG_(RUNTIME_DIR|SESSION_\w+)|TORCHELASTIC_\w+|ORTHOGON_SUBMITTED")
"""What belongs to the submitting machine."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def chosen(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables that a job gets, with the packages importable in it."""
    found = {
        name: value
        for name, value in sorted(environment.items())
        if name in more or (TAKEN.fullmatch(name) and not LEFT.fullmatch(name))
    }
    found["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys(filter(None, [str(ROOT), *found.get("PYTHONPATH", "").split(os.pathsep)]))
    )
    return found


def write(folder: Path, environment: Mapping[str, str], more: Sequence[str] = ()) -> Path:
    """Write the file, readable by its owner from its first byte on."""
    text = "# Read by slurm.sbatch. It may hold keys and tokens: keep it to yourself.\n"
    text += "".join(f"export {name}={shlex.quote(value)}\n" for name, value in chosen(environment, more).items())
    path, made = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    made.unlink(missing_ok=True)
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    made.replace(path)
    return path


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """What an attempt keeps of its environment, for people who ask later; secrets are masked."""
    kept = re.compile(r"(SLURM|CUDA|NCCL|GLOO|TORCH|OMP|MASTER|ORTHOGON)_\w+")
    return {
        name: "***" if SECRET.search(name) else value
        for name, value in sorted(environment.items())
        if kept.fullmatch(name)
    }


def of_submission() -> dict[str, str]:
    """The environment of Slurm's own commands: from inside a job, that job's facts would become the new one's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def python() -> str:
    """The Python that the batch script runs: this one."""
    return sys.executable
