"""Slurm: a run is a batch job that saves, requeues itself and goes on until the run is finished.

What was learnt about Slurm, and why the script is as it is: docs/slurm.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evidence
from launch.slurm import environment, job, query, script, suspects
from launch.slurm.options import Slurm
from trainer import lock
from trainer.files import write_json, write_text
from trainer.outcome import Outcome, RunError
from trainer.registry import STRICT

if TYPE_CHECKING:
    from trainer.config import RunConfig

SCRIPT, HANDLE = "slurm.sbatch", "slurm.json"
UNSEEN_SECONDS = 30.0
"""A job that Slurm does not know so soon after its submission is pending: answers lag."""


@dataclass(frozen=True, kw_only=True)
class Options(Slurm):
    """A Slurm cluster."""

    __pydantic_config__ = STRICT


def submit(
    config: RunConfig, folder: Path, options: Slurm, *, resume: bool = False, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Submit the run in a folder; returns the handle that the other functions take, which the folder keeps, too.

    Args:
        resume: the folder holds attempts; the new job goes on from the newest checkpoint and counts its attempts anew.
        after: jobs that must have ended well before this one starts.

    Raises:
        RunError: a job of this run waits or runs, Slurm does not answer, or does not take the job.
    """
    return submit_members([(config, folder)], options, resume=resume, after=after)[0]


def submit_members(
    members: Sequence[tuple[RunConfig, Path]], options: Slurm, *, resume: bool = False, after: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Submit the runs of an ensemble as one array; returns a handle for each. Of a single run it makes a plain job.

    Raises:
        RunError: as `submit`.
    """
    folders = [folder.absolute() for _, folder in members]
    for folder in folders:
        _check_free(folder, resume)
    text = script.text(members[0][0], folders, options, after, _excluded(folders[0], options))
    path = folders[0] / SCRIPT
    write_text(path, text)
    for folder in folders:
        environment.write(folder, environment.of_submission(), options.environment)
        (folder / job.CANCEL).unlink(missing_ok=True)
    _accepted(query.call("sbatch", "--test-only", str(path)), path)
    answer = query.call("sbatch", "--parsable", str(path))
    _accepted(answer, path)
    number, _, cluster = answer.stdout.strip().partition(";")
    handles = []
    for index, folder in enumerate(folders):
        array = len(folders) > 1
        handle = {
            "job": f"{number}_{index}" if array else number, "cluster": cluster, "submitted": time.time(),
            "script": str(path), "output": script.output(folders[0], array=array).replace("%%", "%")
            .replace("%A", number).replace("%a", str(index)).replace("%j", number),
        }  # fmt: skip
        write_json(folder / HANDLE, handle)
        handles.append(handle)
    return handles


def describe(config: RunConfig, folder: Path, options: Slurm) -> str:
    """The script that `submit` would write.

    Raises:
        RunError: the time limit is too short to train in.
    """
    return script.text(config, [folder.absolute()], options, exclude=_excluded(folder, options))


def state(folder: Path, handle: dict[str, Any]) -> tuple[str, str]:
    """`pending`, `running`, `ended`, `vanished` or `unknown`, and what Slurm says about it."""
    return states([handle])[0]


def states(handles: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The states of many jobs in one query."""
    try:
        found, silence = query.jobs([handle["job"] for handle in handles])
    except query.Silent as error:
        return [("unknown", error.what)] * len(handles)
    answers = []
    for handle in handles:
        known = found.get(handle["job"])
        if known is not None:
            answers.append((known.kind, f"{known.state}, {known.detail}" if known.detail else known.state))
        elif silence:
            answers.append(("unknown", silence))
        elif time.time() - handle["submitted"] < UNSEEN_SECONDS:
            answers.append(("pending", "Slurm does not show it yet"))
        else:
            answers.append(("vanished", f"Slurm knows no job {handle['job']} any more"))
    return answers


def logs(folder: Path, handle: dict[str, Any]) -> list[Path]:
    """The job's own log, and those of the newest attempt: srun's or torchrun's, then the ranks'."""
    found = [Path(handle["output"])]
    numbers = evidence.attempts(folder)
    if numbers:
        newest = folder / "logs" / str(numbers[-1])
        found += [newest / "srun.log", newest / "nodes.log", *sorted(newest.glob("torchrun-*.log"))]
        found += sorted(newest.glob("rank-*.log"), key=lambda path: (len(path.name), path.name))
    return [path for path in found if path.exists()]


def cancel(folder: Path, handle: dict[str, Any], now: bool = False) -> str:
    """End a job for good; a running one saves first, unless it is to end `now`. Returns what was done.

    Raises:
        RunError: Slurm does not answer, or refuses.
    """
    kind, detail = state(folder, handle)
    number = handle["job"]
    if kind in ("ended", "vanished"):
        return f"job {number} is over: {detail}"
    if kind == "unknown":
        raise RunError(
            f"job {number} was not cancelled: {detail}",
            where=str(folder),
            mend="try again in a while",
            outcome=Outcome.INFRASTRUCTURE,
        )
    note = folder / job.CANCEL
    write_json(note, {"job": number, "time": time.time()})
    gentle = kind == "running" and not now
    try:
        answer = query.call("scancel", *(["--batch", "--signal=USR1"] if gentle else []), number)
    except query.Silent:
        note.unlink()
        raise
    if answer.returncode:
        note.unlink()
        raise RunError(
            f"job {number} was not cancelled: {query.complaint(answer)}",
            where=str(folder),
            mend=f"try `scancel {number}`",
            outcome=Outcome.INFRASTRUCTURE,
        )
    return f"job {number} was told to save and end" if gentle else f"job {number} is cancelled"


def member_configs(config: RunConfig, count: int) -> list[RunConfig]:
    """Members of an ensemble: `NAME-0`, `NAME-1` ... with seeds of their own for weights and order."""
    return [
        replace(
            config,
            name=f"{config.name}-{index}",
            seed=config.seed + index,
            data=replace(config.data, order_seed=config.data.order_seed + index),
        )
        for index in range(count)
    ]


def _excluded(folder: Path, options: Slurm) -> list[str]:
    """The nodes not to use: those of the options, and suspects if enough nodes are left without them."""
    bad = suspects.read(folder.absolute().parent)
    return suspects.left(bad, options.exclude, options.nodes, options.partition) if bad else list(options.exclude)


def _check_free(folder: Path, resume: bool) -> None:
    """No job of this run waits or runs, and nobody writes it.

    Raises:
        RunError: one does; or the folder holds attempts and is not to be resumed.
    """
    lock.check_free(folder)
    if not resume and evidence.attempts(folder):
        raise RunError(f"run {folder.name} has been started before", where=str(folder), mend=f"go on with `orthogon resume {folder.name}`")  # fmt: skip
    handle = evidence.record(folder / HANDLE)
    if handle is None:
        return
    kind, detail = state(folder, handle)
    if kind not in ("ended", "vanished"):
        raise RunError(
            f"job {handle['job']} of run {folder.name} is {kind}: {detail}",
            where=str(folder / HANDLE),
            mend=f"wait for it, or end it with `orthogon cancel {folder.name}`",
            outcome=Outcome.INFRASTRUCTURE if kind == "unknown" else Outcome.BAD_CONFIGURATION,
        )


def _accepted(answer: Any, path: Path) -> None:
    """Slurm takes the job.

    Raises:
        RunError: with what Slurm says against it.
    """
    if answer.returncode:
        raise RunError(
            f"Slurm does not take the job: {query.complaint(answer)}",
            where=str(path),
            mend="ask for what the cluster has: `sinfo` shows its partitions and nodes, `sacctmgr show assoc` your accounts",
        )
