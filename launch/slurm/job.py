"""What the batch script asks at the start and the end of an attempt; the script evaluates the answer.

`begin` answers `attempt=3`, where ranks meet, and `over=` (empty: go), or `over=CODE`: the job is over, with this exit code.
`end` answers `over=CODE`; `over=wait`: the job was requeued, or Slurm is ending it; or `over=`: begin another attempt here.

The decisions are those of `launch/retry.py` on the attempts of this job, which are told by `logs/N/slurm.json`.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import attempt, evidence, handles, retry
from launch.culprit import first_line
from launch.slurm import query, rendezvous, suspects
from launch.slurm.environment import recorded
from trainer import runfolder
from trainer.files import write_json
from trainer.guard import heartbeat
from trainer.outcome import Outcome, RunError

FILE = "slurm.json"
CANCEL = "slurm.cancel"
"""In the run folder: the job that was asked to save and end for good."""
REQUEUE_TRIES, REQUEUE_PAUSE = 12, 5.0


def main() -> int:
    import argparse  # not for the launcher, which asks this module whether a job was cancelled

    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["begin", "end"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--signal", default="")
    parser.add_argument("--code", type=int, default=0)
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the script notes them; this process, and scontrol, go on
        signal.signal(number, signal.SIG_IGN)
    try:
        if given.what == "begin":
            answer = begin(given.folder, os.environ)
        else:
            answer = end(given.folder, given.attempt, given.signal, given.code, os.environ)
    except RunError as error:
        say(str(error))
        answer = {"over": str(error.outcome.code)}
    print(" ".join(f"export {name}={shlex.quote(value)};" for name, value in answer.items()))
    return 0


def say(text: str) -> None:
    """A line in the job's log; standard output is the script's."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def begin(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Make the next attempt, unless the ones of this job so far say that there is to be none.

    Raises:
        RunError: its folder cannot be made.
    """
    job, nodes = job_of(environment), rendezvous.hosts(environment["SLURM_JOB_NODELIST"])
    mine = of_job(folder, job)
    for number, facts in mine.items():
        if evidence.record(folder / "logs" / str(number) / attempt.FILE) is None:
            cut_off(folder, number, facts)
    if cancelled(folder, job):
        say("this job was cancelled: no attempt")
        return {"over": str(Outcome.PREEMPTED.code)}
    if mine:
        decision, record = judge(folder, mine)
        if isinstance(decision, retry.Stop):
            say(f"no further attempt: {decision.why}")
            return {"over": str(record["exit_code"])}
    number = runfolder.new_attempt(folder)
    host, port = rendezvous.rendezvous(
        environment["SLURM_JOB_NODELIST"], int(environment["SLURM_JOB_ID"]), len(mine), rendezvous.free
    )
    facts = {
        "job": job, "restart": int(environment.get("SLURM_RESTART_COUNT", "0")), "nodes": nodes, "address": host,
        "port": port, "time": time.time(), "environment": recorded(environment),
        "start": next(iter(mine.values()))["start"] if mine else evidence.newest_checkpoint(folder) or 0,
    }  # fmt: skip
    write_json(folder / "logs" / str(number) / FILE, facts)
    where = f"step {evidence.newest_checkpoint(folder) or 0}"
    say(f"attempt {number} of {folder.name} from {where} on {', '.join(nodes)}; ranks meet at {host}:{port}")
    return {"attempt": str(number), "MASTER_ADDR": host, "MASTER_PORT": str(port), "over": ""}


def end(folder: Path, number: int, told: str, code: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Judge an attempt whose srun has ended, and do what follows from it.

    Args:
        told: the signal that the script got, or empty.
        code: srun's exit code.
    """
    job = job_of(environment)
    mine = of_job(folder, job)
    facts, stop = mine[number], cancelled(folder, job)
    record = close(
        folder, number, facts, asked=bool(told) or stop, cancel=stop, ended=srun_failed(folder, number, code)
    )
    blamed = blame(folder, number, facts, asked=bool(told))
    decision, _ = judge(folder, mine)
    say(f"attempt {number} ended ({record['outcome']}: {first_line(record['message'])})")
    if isinstance(decision, retry.Stop):
        say(f"no further attempt: {decision.why}")
        return {"over": str(record["exit_code"])}
    runfolder.record_event(folder, "restart", attempt=number, outcome=record["outcome"], why=decision.why)
    if not told and not blamed and record["outcome"] != Outcome.PREEMPTED.value:
        say(f"another attempt on the same nodes in {decision.seconds:g} s: {decision.why}")
        time.sleep(decision.seconds)
        return {"over": ""}
    return requeue(folder, job, decision.why, environment, str(record["exit_code"]))


def requeue(folder: Path, job: str, why: str, environment: Mapping[str, str], code: str) -> dict[str, str]:
    """Put the job back into the queue, away from suspect nodes, unless Slurm is already ending it.

    Slurm does not do it by itself after a time limit, nor for a script that ends within the grace time of a preemption.
    """
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    for left in reversed(range(REQUEUE_TRIES)):
        try:
            facts = query.read_scontrol(query.call("scontrol", "--oneliner", "show", "job", job).stdout)
            state = facts.get("JobState")
            if state not in ("COMPLETING", None) and facts.get("Restarts", restarts) != restarts:
                say("this node was cut off: Slurm has started the job elsewhere meanwhile")
                return {"over": code}
            if state not in (None, "RUNNING"):
                say(f"Slurm is ending this start of the job ({state})")
                return {"over": "wait"}
            answer = query.call("scontrol", "requeue", job)
            if answer.returncode == 0:
                say(f"requeued: {why}")
                keep_off(folder, job, environment)
                return {"over": "wait"}
            trouble = query.complaint(answer)
        except query.Silent as error:
            trouble = error.what
        say(f"not requeued: {trouble}" + ("; trying again" if left else ""))
        if left:
            time.sleep(REQUEUE_PAUSE)
    say(f"go on with: {handles.resume_command(handles.read(folder), folder.name)}")
    return {"over": code}


def keep_off(folder: Path, job: str, environment: Mapping[str, str]) -> None:
    """Exclude suspect nodes from the next start; a job that has just been requeued lets itself be changed."""
    bad = suspects.read(folder.parent)
    if not bad:
        return
    facts = query.read_scontrol(query.call("scontrol", "--oneliner", "show", "job", job).stdout)
    before = facts.get("ExcNodeList", "(null)")
    always = [] if before == "(null)" else rendezvous.hosts(before)
    count = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    nodes = suspects.left(bad, always, count, environment.get("SLURM_JOB_PARTITION"))
    if set(nodes) == set(always):
        return
    answer = query.call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
    told = "; ".join(f"{node}: {bad[node]}" for node in nodes if node in bad)
    say(f"nodes excluded: {told}" if answer.returncode == 0 else f"not excluded ({told}): {query.complaint(answer)}")


def cut_off(folder: Path, number: int, facts: dict[str, Any]) -> None:
    """Judge an attempt of this job that nobody could judge at its end: its batch script died, too."""
    record = close(folder, number, facts, asked=False, cancel=False, ended="")
    blame(folder, number, facts, asked=record["outcome"] == Outcome.PREEMPTED.value)
    say(f"attempt {number} was cut off by Slurm ({record['outcome']}: {first_line(record['message'])})")


def close(folder: Path, number: int, facts: dict[str, Any], *, asked: bool, cancel: bool, ended: str) -> dict[str, Any]:
    """Record an attempt as `launch/attempt.py` does. Only a cancellation counts as asked for: Slurm's own signals mean that
    the run goes on later."""
    record = attempt.close(folder, number, asked, facts["time"], "")
    logs = folder / "logs" / str(number)
    if ended and record["outcome"] == Outcome.INFRASTRUCTURE.value and evidence.told(logs) is None:
        record |= {"message": ended}
    record |= {"asked": cancel, "job": facts["job"], "nodes": facts["nodes"]}
    write_json(logs / attempt.FILE, record)
    return record


def srun_failed(folder: Path, number: int, code: int) -> str:
    """What srun said if no rank left a sign of life; empty if one did."""
    logs = folder / "logs" / str(number)
    if code == 0 or heartbeat.read_all(logs):
        return ""
    last = evidence.last_lines(logs / "srun.log", 1) or evidence.last_lines(logs / "nodes.log", 1)
    return f"no rank started; srun ended with {code}" + (f": {last[0].strip()}" if last else "")


def blame(folder: Path, number: int, facts: dict[str, Any], *, asked: bool) -> dict[str, str]:
    """Note the nodes of an attempt that are to blame for its end."""
    logs = folder / "logs" / str(number)
    record = evidence.record(logs / attempt.FILE) or {}
    if record.get("outcome") == Outcome.FINISHED.value:
        return {}
    found = suspects.seen(logs, facts["nodes"], asked=asked, seconds=float(record.get("seconds") or 0))
    if found:
        suspects.add(folder, facts["job"], found)
        say("; ".join(f"node {node} is suspect: {reason}" for node, reason in found.items()))
    return found


def judge(folder: Path, mine: Mapping[int, dict[str, Any]]) -> tuple[retry.Again | retry.Stop, dict[str, Any]]:
    """What follows the attempts of this job, and the record of the last one."""
    records = [evidence.record(folder / "logs" / str(number) / attempt.FILE) for number in mine]
    known = [record for record in records if record is not None]
    past = [attempt.for_retry(folder, record) for record in known]
    return retry.decide(past, next(iter(mine.values()))["start"]), known[-1]


def of_job(folder: Path, job: str) -> dict[int, dict[str, Any]]:
    """The attempts that a job has made, oldest first, with what it noted at their start."""
    found = {}
    for number in evidence.attempts(folder):
        facts = evidence.record(folder / "logs" / str(number) / FILE)
        if facts is not None and facts.get("job") == job:
            found[number] = facts
    return found


def job_of(environment: Mapping[str, str]) -> str:
    """This job as Slurm's commands take it. A member of an array has a number of its own in SLURM_JOB_ID, too, but the last
    member's is that of the whole array: commands would mean all of it."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def cancelled(folder: Path, job: str) -> bool:
    """Whether this job was asked to save and end for good."""
    return (evidence.record(folder / CANCEL) or {}).get("job") == job


if __name__ == "__main__":
    sys.exit(main())
