"""Slurm: a run is a batch job that saves, requeues itself and goes on until the run is finished.

What was learnt about Slurm, and why the script is as it is: docs/slurm.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evidence, handles, standing
from launch.slurm import environment, job, query, script, suspects
from launch.slurm import options as slurm_options
from trainer.files import write_json, write_text
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

SCRIPT = "slurm.sbatch"
UNSEEN_SECONDS = 30.0
"""A job that Slurm does not know so soon after its submission is pending: answers lag."""
Options = slurm_options.Options


def submit(
    config: RunConfig, folder: Path, options: Options, *, resume: bool, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Submit the run in a folder as a job, which goes on from the newest checkpoint and counts its attempts anew.

    Raises:
        RunError: Slurm does not answer or does not take the job, or a run of `after` cannot be waited for.
    """
    return submit_members([(config, folder)], options, after=after)[0]


def submit_members(
    members: Sequence[tuple[RunConfig, Path]], options: Options, *, after: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Submit the runs of an ensemble as one array; returns a handle for each. Of a single run it makes a plain job.

    Raises:
        RunError: as `submit`.
    """
    folders = [folder.absolute() for _, folder in members]
    waits = _jobs(folders[0].parent, after)
    text = script.text(members[0][0], folders, options, waits, _excluded(folders[0], options))
    path = folders[0] / SCRIPT
    write_text(path, text)
    for folder in folders:
        environment.write(folder, environment.of_submission(), options.environment)
        (folder / job.CANCEL).unlink(missing_ok=True)
    _accepted(query.call("sbatch", "--test-only", str(path)), path)
    answer = query.call("sbatch", "--parsable", str(path))
    _accepted(answer, path)
    number, _, cluster = answer.stdout.strip().partition(";")
    array = len(folders) > 1
    output = script.output(folders[0], array=array).replace("%A", number).replace("%j", number)
    return [
        {
            "job": f"{number}_{index}" if array else number, "cluster": cluster, "time": time.time(),
            "script": str(path), "output": output.replace("%a", str(index)).replace("%%", "%"),
        }
        for index in range(len(folders))
    ]  # fmt: skip


def describe(config: RunConfig, folder: Path, options: Options) -> str:
    """The script that `submit` would write.

    Raises:
        RunError: the time limit is too short to train in.
    """
    return script.text(config, [folder.absolute()], options, exclude=_excluded(folder, options))


def state(folder: Path, handle: dict[str, Any]) -> tuple[str, str]:
    """What Slurm says about the job."""
    return states([(folder, handle)])[0]


def states(pairs: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[str, str]]:
    """The states of many jobs in one query."""
    try:
        found, silence = query.jobs([handle["job"] for _, handle in pairs])
    except query.Silent as error:
        return [("unknown", error.what)] * len(pairs)
    answers = []
    for _, handle in pairs:
        known = found.get(handle["job"])
        if known is not None:
            answers.append((known.kind, f"{known.state}, {known.detail}" if known.detail else known.state))
        elif silence:
            answers.append(("unknown", silence))
        elif time.time() - handle["time"] < UNSEEN_SECONDS:
            answers.append(("pending", "Slurm does not show it yet"))
        else:
            answers.append(("vanished", f"Slurm knows no job {handle['job']} any more"))
    return answers


def logs(folder: Path, handle: dict[str, Any]) -> list[Path]:
    """The logs of the ranks, of what started them, and of the job."""
    newest = folder / "logs" / str(evidence.newest_attempt(folder))
    others = [newest / "srun.log", newest / "nodes.log", Path(handle["output"])]
    return [*evidence.logs_of(folder), *filter(Path.exists, others)]


def cancel(folder: Path, handle: dict[str, Any], now: bool) -> str:
    """End a job for good; a running one saves first, unless it is to end `now`.

    Raises:
        RunError: Slurm does not answer, or refuses.
    """
    kind, detail = state(folder, handle)
    number, who = handle["job"], f"run {folder.name} (job {handle['job']})"
    if kind in ("ended", "vanished"):
        return f"run {folder.name} is not running: job {number} is over: {detail}"
    if kind == "unknown":
        raise RunError(
            f"{who} was not cancelled: {detail}",
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
            f"{who} was not cancelled: {query.complaint(answer)}",
            where=str(folder),
            mend=f"try `scancel {number}`",
            outcome=Outcome.INFRASTRUCTURE,
        )
    if gentle:
        return f"asked {who} to save and end"
    return f"cancelled {who}" + ("; steps since the newest checkpoint are lost" if kind == "running" else "")


def _jobs(runs: Path, after: Sequence[str]) -> list[str]:
    """The jobs of runs that must finish first; one that has finished needs no waiting for.

    Raises:
        RunError: one of them will never finish by itself, or its end cannot be waited for here.
    """
    found = []
    for name in after:
        handle, stands = handles.read(runs / name), standing.read(runs / name)
        if stands.state == Outcome.FINISHED.value:
            continue
        if handle is None or handle["backend"] != __name__.rpartition(".")[2]:
            raise RunError(
                f"run {name} is no job of Slurm, which cannot wait for it",
                where="command line, --after",
                mend=f"give it to Slurm, or submit this one when {name} is finished",
            )
        if not stands.alive and stands.state != "unknown":
            raise RunError(
                f"run {name} is not going to finish: {stands.state}: {stands.note}",
                where="command line, --after",
                mend=f"resume {name} first",
            )
        found.append(str(handle["job"]))
    return found


def _excluded(folder: Path, options: Options) -> list[str]:
    """The nodes not to use: those of the options, and suspects if enough nodes are left without them."""
    bad = suspects.read(folder.absolute().parent)
    return suspects.left(bad, options.exclude, options.nodes, options.partition) if bad else list(options.exclude)


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
