"""Kubernetes: an Indexed Job with a headless Service, or a Kubeflow TrainJob, whose pods run `orthogon node`.

The pods share the run folder on a volume and find each other by the names that the index gives them; supervisors, leaders
and lost nodes are those of `launch/cluster.py`. Pods are not retried for what would happen again: their exit codes tell.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import evidence
from launch.kubernetes import objects
from trainer.files import write_text
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

MANIFEST = "kubernetes.yaml"
PATIENCE = 20.0
"""Seconds that `kubectl` gets to answer."""
Options = objects.Options


def submit(
    config: RunConfig, folder: Path, options: Options, *, resume: bool, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Create the job of the run in a folder, and the file it was created from.

    Raises:
        RunError: options that do not fit, a job that must wait for others, no `kubectl`, or an API that refuses.
    """
    if after:
        raise RunError(
            "a Kubernetes job cannot wait for other runs",
            where="command line, --after",
            mend="submit it when they are done, or use Slurm",
        )
    text, name = describe(config, folder, options), objects.job_name(folder)
    write_text(folder / MANIFEST, text)
    done = _kubectl("create", f"--namespace={options.namespace}", f"--filename={folder / MANIFEST}")
    if done.returncode:
        taken = "AlreadyExists" in done.stderr
        raise RunError(
            f"Kubernetes did not take the job: {_last(done)}",
            where=str(folder / MANIFEST),
            mend="cancel the job that is there, or wait for it" if taken else "correct it, or try again",
            outcome=Outcome.BAD_CONFIGURATION if taken else Outcome.INFRASTRUCTURE,
        )
    return {"kind": options.kind, "name": name, "namespace": options.namespace}


def describe(config: RunConfig, folder: Path, options: Options) -> str:
    """The objects as YAML.

    Raises:
        RunError: options that make no job.
    """
    import yaml

    return yaml.safe_dump_all(objects.objects(config, folder, options), sort_keys=False)


def state(folder: Path, handle: dict[str, Any]) -> tuple[str, str]:
    """What became of a job: (pending, running, ended, vanished or unknown; detail)."""
    try:
        done = _kubectl("get", handle["kind"], handle["name"], f"--namespace={handle['namespace']}", "--output=json")
        if done.returncode:
            lost = "NotFound" in done.stderr
            return (
                ("vanished", f"there is no {handle['kind']} {handle['name']} any more")
                if lost
                else ("unknown", _last(done))
            )
        return _word(json.loads(done.stdout).get("status") or {})
    except RunError as error:
        return "unknown", error.what
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return "unknown", f"kubectl's answer is not understood: {type(error).__name__}"


def logs(folder: Path, handle: dict[str, Any]) -> list[Path]:
    """The logs of the ranks and of torchrun; they lie in the run folder, as everywhere."""
    return evidence.logs_of(folder)


def cancel(folder: Path, handle: dict[str, Any], now: bool) -> str:
    """Delete the job: its pods get SIGTERM and the time to save, or with `now` none.

    Raises:
        RunError: the API does not answer, or refuses.
    """
    word, detail = state(folder, handle)
    kind, name = handle["kind"], handle["name"]
    who = f"run {folder.name} ({kind} {name})"
    if word in ("ended", "vanished"):
        return f"run {folder.name} is not running: {detail}"
    things = [f"{kind}/{name}", *([f"service/{name}"] if kind == "job" else [])]
    hurry = ["--grace-period=0", "--force"] if now else []
    where = f"--namespace={handle['namespace']}"
    done = _kubectl("delete", *things, where, "--wait=false", "--ignore-not-found", *hurry)
    if done.returncode:
        raise RunError(
            f"{who} was not cancelled: {_last(done)}",
            where=str(folder),
            mend="try again in a while",
            outcome=Outcome.INFRASTRUCTURE,
        )
    return (
        f"deleted {who} at once; steps since the newest checkpoint are lost" if now else f"asked {who} to save and end"
    )


def _word(status: dict[str, Any]) -> tuple[str, str]:
    """The state in the status of a Job or a TrainJob."""
    for condition in status.get("conditions") or []:
        if condition.get("status") == "True" and condition["type"] in ("Complete", "Failed"):
            why = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
            return "ended", f"{condition['type'].lower()}{f' ({why})' if why else ''}"
    jobs = status.get("jobsStatus") or [status]
    active = sum(one.get("active") or 0 for one in jobs)
    ready = sum(one.get("ready") or 0 for one in jobs)
    suspended = any(c["type"] == "Suspended" and c.get("status") == "True" for c in status.get("conditions") or [])
    if ready:
        return "running", f"{ready} of {max(active, ready)} pods are ready"
    return "pending", "suspended, by a queue or by hand" if suspended else f"{active} pods wait for a node or an image"


def _kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kubectl`.

    Raises:
        RunError: it is not on PATH, or does not answer.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise RunError(
            "kubectl is not on PATH, which the kubernetes backend works through",
            where="PATH",
            mend="install it, or print the objects by --dry-run and create them where it is",
        )
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(
            f"kubectl does not answer: {error}", where="kubectl", mend="try again", outcome=Outcome.INFRASTRUCTURE
        ) from None


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """What `kubectl` said last against it."""
    return (done.stderr.strip().splitlines() or ["kubectl said nothing"])[-1]
