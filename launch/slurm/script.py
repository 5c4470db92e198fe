"""The batch script of a run: text for people to read, and for Slurm to run again at every requeue."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.process import ROOT
from launch.slurm.environment import FILE as ENVIRONMENT
from launch.slurm.environment import python
from launch.slurm.options import Options, minutes
from trainer.outcome import RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

MARGIN_SECONDS = 60
"""What a warning before the time limit leaves beyond `guard.stop_timeout`; Slurm gives it up to as much earlier."""
WAIT_SECONDS = 120
"""How long ranks may take to leave after the first one has left in order."""


def text(
    config: RunConfig, folders: Sequence[Path], options: Options, after: Sequence[str] = (), exclude: Sequence[str] = ()
) -> str:
    """The script of one run, or of an array with one run per member.

    Args:
        config: of the run, or of the first member.
        folders: the run folder, or those of all members in the order of their numbers.
        after: jobs that must have ended well before this one starts.
        exclude: nodes that are not used.

    Raises:
        RunError: the time limit is too short to train in.
    """
    return "\n".join(
        [
            *_head(config, folders, options, after, exclude),
            "",
            *_prepare(folders, options),
            "",
            *_body(config, options),
            "",
        ]
    )


def ranks_per_node(config: RunConfig, options: Options) -> int:
    return options.ranks_per_node or config.resources.ranks or 1


def warning_seconds(config: RunConfig, options: Options) -> int:
    """How long before its time limit the job is told.

    Raises:
        RunError: there would be no time left to train.
    """
    seconds = math.ceil(config.guard.stop_timeout) + MARGIN_SECONDS
    if options.time is not None and minutes(options.time) * 60 <= seconds:
        raise RunError(
            f"the time limit of {options.time} leaves no time to train: a run is told {seconds} s before it",
            where="time, guard.stop_timeout",
            mend=f"ask for {math.ceil((seconds + 600) / 60)} minutes or more",
        )
    return seconds


def output(folder: Path, *, array: bool) -> str:
    """The job's own log, in Slurm's pattern."""
    return str(folder.absolute() / "logs").replace("%", "%%") + ("/slurm-%A_%a.out" if array else "/slurm-%j.out")


def _head(
    config: RunConfig, folders: Sequence[Path], options: Options, after: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    ranks, array = ranks_per_node(config, options), len(folders) > 1
    what = f"Runs {folders[0].name} to {folders[-1].name}" if array else f"Run {folders[0].name}"
    lines = [
        "#!/bin/bash",
        f"# {what}: {_count(options.nodes, 'node')} of {_count(ranks, 'rank')}. Slurm keeps a copy and runs it again at every requeue.",
        f"#SBATCH --job-name={folders[0].name}",
        f"#SBATCH --chdir={_word(str(Path.cwd()))}",
        f"#SBATCH --output={_word(output(folders[0], array=array))}",
        "#SBATCH --open-mode=append",
        f"#SBATCH --nodes={options.nodes}",
        f"#SBATCH --ntasks-per-node={ranks}",
        f"#SBATCH --cpus-per-task={_cpus(config, options)}",
    ]
    if options.gres is not None:
        lines.append(f"#SBATCH --gres={options.gres}")
    elif config.resources.device != "cpu":
        lines.append(f"#SBATCH --gpus-per-node={ranks}")
    for key, value in (
        ("mem", options.mem), ("time", options.time), ("partition", options.partition), ("account", options.account),
        ("qos", options.qos), ("constraint", _word(options.constraint) if options.constraint else None),
    ):  # fmt: skip
        if value is not None:
            lines.append(f"#SBATCH --{key}={value}")
    if options.exclusive:
        lines.append("#SBATCH --exclusive")
    if exclude:
        lines.append(f"#SBATCH --exclude={','.join(exclude)}")
    if array:
        most = f"%{options.array_limit}" if options.array_limit else ""
        lines.append(f"#SBATCH --array=0-{len(folders) - 1}{most}")
    if after:
        lines.append(f"#SBATCH --dependency=afterok:{':'.join(after)}")
    seconds = warning_seconds(config, options)
    return [
        *lines,
        "# A job that waits for this one is cancelled, instead of waiting for ever, if this one fails.",
        "#SBATCH --kill-on-invalid-dep=yes",
        "# Preempted, or a node lost: Slurm starts the job again. After a time limit it does not: the script does.",
        "#SBATCH --requeue",
        f"# USR1 comes {seconds} s before the time limit (guard.stop_timeout and {MARGIN_SECONDS} s), up to 60 s earlier.",
        f"#SBATCH --signal=B:USR1@{seconds}",
        "# The submitter's environment stays out of Slurm's records.",
        "#SBATCH --export=NONE",
        *(f"#SBATCH {line}" for line in options.sbatch),
    ]


def _prepare(folders: Sequence[Path], options: Options) -> list[str]:
    lines = ["set -uo pipefail  # not -e: a wait that a signal ends is no error"]
    if len(folders) > 1:
        lines += ["members=(", *(f"  {_word(str(folder.absolute()))}" for folder in folders), ")"]
        lines.append("folder=${members[$SLURM_ARRAY_TASK_ID]}")
    else:
        lines.append(f"folder={_word(str(folders[0].absolute()))}")
    return [
        *lines,
        "# What the job gets of the submitter's environment; only its owner can read it.",
        f'source "$folder/{ENVIRONMENT}"',
        *options.setup,
        f"helper=({_word(python())} -m launch.slurm.job)  # what a start and an end mean: launch/slurm/job.py",
    ]


def _body(config: RunConfig, options: Options) -> list[str]:
    ranks, cpus = ranks_per_node(config, options), _cpus(config, options)
    all_nodes = ["srun --export=ALL --kill-on-bad-exit=1 --wait=" + str(WAIT_SECONDS), f"--nodes={options.nodes}"]
    more, inside = [*_container_of_srun(options), *options.srun], _python(options)
    if options.start == "srun":
        how = "# srun starts every rank itself; they find their numbers in SLURM_PROCID (trainer/environment.py)."
        tasks = f"--ntasks={options.nodes * ranks} --ntasks-per-node={ranks} --cpus-per-task={cpus}"
        line = f'{inside} -m trainer train "$folder" --attempt="$attempt"'
        log = "srun.log"
    else:
        how = "# srun starts one supervisor of torchrun per node (launch/slurm/node.py), and torchrun the ranks."
        tasks = f"--ntasks={options.nodes} --ntasks-per-node=1 --cpus-per-task={cpus * ranks}"
        line = f'{inside} -m launch.slurm.node "$folder" --attempt="$attempt" --ranks={ranks}'
        log = "nodes.log"
    start = " ".join([*all_nodes, tasks, *more]) + " \\\n      " + line + f' 2>>"$folder/logs/$attempt/{log}" &'
    # Without srun where that can be: it needs a controller, and a finished run must not fail because that is away.
    alone = ["srun --export=ALL --nodes=1 --ntasks=1", *more] if _container_of_srun(options) else []
    finish = " ".join([*alone, inside, '-m trainer finish "$folder"'])
    return [
        "why= child=",
        "# USR1: the time limit is near. TERM: preempted, requeued or cancelled. Both mean save, which the ranks do at USR1.",
        "# CONT comes along with both and must not be trapped: bash would lose the other.",
        'tell() { [ -n "$child" ] && kill -USR1 "$child" 2>/dev/null; }',
        "trap 'why=${why:-USR1}; tell' USR1",
        "trap 'why=TERM; tell' TERM",
        "",
        "while :; do",
        "  # Judges an attempt that Slurm cut off, makes the next one's folder, and says where its ranks meet; or that it is over.",
        "  over=70",
        '  eval "$("${helper[@]}" begin "$folder")"',
        '  [ -n "$over" ] && break',
        "  code=0",
        '  if [ -z "$why" ]; then',
        f"    {how}",
        f"    {start}",
        "    child=$!",
        '    [ -n "$why" ] && tell',
        "    # A trap ends `wait`, too: go on as long as srun lives.",
        '    while :; do wait "$child"; code=$?; [ $code -gt 128 ] && kill -0 "$child" 2>/dev/null || break; done',
        "    child=",
        "  fi",
        "  # Judges the attempt: over, another one here, or requeued. An exit code says too little: a script that ends by itself",
        "  # is not requeued, and 0 starts the jobs that wait for this one.",
        "  over=70",
        '  eval "$("${helper[@]}" end "$folder" --attempt="$attempt" --signal="$why" --code="$code")"',
        '  [ -n "$over" ] && break',
        "done",
        "",
        "# Requeued, or being ended by Slurm: leaving by itself would count as the end of the job.",
        'while [ "$over" = wait ]; do sleep 1; done',
        '[ "$over" = 0 ] || exit "$over"',
        f"{finish}",
    ]


def _python(options: Options) -> str:
    if options.container is None:
        return _word(python())
    if options.container_runtime == "apptainer":
        binds = ",".join([str(ROOT), '"$folder/.."', *options.mounts])
        return f"apptainer exec --nv --bind {binds} {options.container} {options.container_python}"
    return options.container_python


def _container_of_srun(options: Options) -> list[str]:
    if options.container is None or options.container_runtime != "pyxis":
        return []
    mounts = ",".join([f"{ROOT}:{ROOT}", '"${folder%/*}:${folder%/*}"', *options.mounts])
    return [
        f"--container-image={options.container}",
        f"--container-mounts={mounts}",
        f"--container-workdir={_word(str(Path.cwd()))}",
    ]


def _cpus(config: RunConfig, options: Options) -> int:
    return options.cpus_per_rank or config.resources.threads_per_rank


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"


def _word(text: str) -> str:
    return shlex.quote(text)
