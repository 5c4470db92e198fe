"""Kubernetes: an Indexed Job with a headless Service, or a Kubeflow TrainJob, whose pods run `orthogon node`.

The pods share the run folder on a volume and find each other by the names that the index gives them; supervisors, leaders
and lost nodes are those of `launch/cluster.py`. Pods are not retried for what would happen again: their exit codes tell.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch import evidence
from trainer.files import digest, write_text
from trainer.outcome import Outcome, RunError
from trainer.registry import STRICT

if TYPE_CHECKING:
    from trainer.config import RunConfig

MANIFEST = "kubernetes.yaml"
MORE_SECONDS = 60
"""What a pod gets beyond the time in which ranks promise to answer a signal."""
PATIENCE = 20.0
"""Seconds that `kubectl` gets to answer."""
DETERMINISTIC = (Outcome.DIVERGED, Outcome.OUT_OF_DATA, Outcome.NO_SPACE, Outcome.BAD_CONFIGURATION)
RESTARTS = 6
"""Pods that may be lost to infrastructure before the job fails; preempted ones do not count."""
TRAINER = "trainer.kubeflow.org"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A Kubernetes cluster."""

    __pydantic_config__ = STRICT
    image: str = ""
    """The image of the pods, see docker/README.md."""
    nodes: int = 1
    """Pods; each runs the ranks of one node."""
    gpus_per_node: int = 0
    """GPUs of each pod (`nvidia.com/gpu`); 0 asks for none."""
    cpu: str = "4"
    """CPUs of each pod, as Kubernetes writes them."""
    memory: str = "16Gi"
    """Memory of each pod."""
    namespace: str = "default"
    """The namespace."""
    claim: str = ""
    """The volume claim (ReadWriteMany) that holds the folder of runs."""
    mount: str = "/work/runs"
    """Where pods see the folder of runs."""
    kind: Literal["job", "trainjob"] = "job"
    """An Indexed Job, or a Kubeflow TrainJob on the runtime `torch-distributed`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of the job and its pods, e.g. that of a queue."""


def submit(config: RunConfig, folder: Path, options: Any, *, resume: bool, after: Sequence[str] = ()) -> dict[str, Any]:
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
    text, name = describe(config, folder, options), job_name(folder)
    write_text(folder / MANIFEST, text)
    done = kubectl("create", f"--namespace={options.namespace}", f"--filename={folder / MANIFEST}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["kubectl said nothing"]
        taken = "AlreadyExists" in done.stderr
        raise RunError(
            f"Kubernetes did not take the job: {said[-1]}",
            where=str(folder / MANIFEST),
            mend="cancel the job that is there, or wait for it" if taken else "correct it, or try again",
            outcome=Outcome.BAD_CONFIGURATION if taken else Outcome.INFRASTRUCTURE,
        )
    return {"kind": options.kind, "name": name, "namespace": options.namespace}


def describe(config: RunConfig, folder: Path, options: Any) -> str:
    """The objects as YAML."""
    import yaml

    check(config, options)
    objects = train_job(config, folder, options) if options.kind == "trainjob" else job(config, folder, options)
    return yaml.safe_dump_all(objects, sort_keys=False)


def check(config: RunConfig, options: Any) -> None:
    """Refuse options that make no job.

    Raises:
        RunError: no image or volume, a path that is not absolute, or another number of ranks than of GPUs.
    """
    wrong = ""
    if not options.image or not options.claim:
        wrong = f"{'image' if not options.image else 'claim'} is missing"
    elif options.nodes < 1 or options.gpus_per_node < 0:
        wrong = f"{options.nodes} nodes with {options.gpus_per_node} GPUs are none"
    elif not options.mount.startswith("/"):
        wrong = f"mount is '{options.mount}', which is no absolute path"
    elif options.gpus_per_node and config.resources.ranks not in (None, options.gpus_per_node):
        wrong = f"resources.ranks is {config.resources.ranks} and gpus_per_node is {options.gpus_per_node}"
    if wrong:
        raise RunError(f"kubernetes: {wrong}", where="options of the backend", mend="correct it")


def job_name(folder: Path) -> str:
    """A name that Kubernetes takes (a DNS label, with room for the index of a pod): that of the run and its next attempt."""
    label = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if label != folder.name or len(label) > 40:
        label = f"{label[:32].strip('-')}-{digest(folder.name)[:6]}"
    number = max(evidence.attempts(folder), default=0) + 1
    return f"orthogon-{label}-{number}"


def command(folder: Path, options: Any, hosts: Sequence[str], host: str) -> list[str]:
    """The arguments of `orthogon` in a pod; the index is filled in by Kubernetes."""
    return ["node", folder.name, f"--runs={options.mount}", f"--hosts={','.join(hosts)}", f"--host={host}"]


def job(config: RunConfig, folder: Path, options: Any) -> list[dict[str, Any]]:
    """A headless Service, which gives the pods their names, and the Indexed Job."""
    name = job_name(folder)
    hosts = [f"{name}-{index}.{name}" for index in range(options.nodes)]
    labels = {"app.kubernetes.io/name": "orthogon", **options.labels}
    metadata = {"name": name, "namespace": options.namespace, "labels": labels}
    container = {
        "name": "orthogon",
        "image": options.image,
        "args": command(folder, options, hosts, f"{name}-$(HOST_INDEX).{name}"),
        "env": environment(),
        "resources": resources(options),
        "volumeMounts": mounts(options),
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",  # as podFailurePolicy asks; a new pod takes the place of a lost one
        "terminationGracePeriodSeconds": grace(config),
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": volumes(options),
    }
    codes = [outcome.code for outcome in DETERMINISTIC]
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "orthogon", "operator": "In", "values": codes}},
        {"action": "Ignore", "onExitCodes": {"containerName": "orthogon", "operator": "In", "values": [Outcome.PREEMPTED.code]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]  # fmt: skip
    selector = {"batch.kubernetes.io/job-name": name}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}
    spec = {
        "completions": options.nodes,
        "parallelism": options.nodes,
        "completionMode": "Indexed",
        "backoffLimit": RESTARTS,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec},
    ]


def train_job(config: RunConfig, folder: Path, options: Any) -> list[dict[str, Any]]:
    """A TrainJob whose node containers run `orthogon node`; what the runtime's torchrun would do is ours.

    Volumes and patience reach the pods as patches of the runtime. Exit codes cannot: its own retries hold.
    """
    name = job_name(folder)
    hosts = [f"{name}-node-0-{index}.{name}" for index in range(options.nodes)]
    patch = {
        "terminationGracePeriodSeconds": grace(config),
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "containers": [{"name": "node", "volumeMounts": mounts(options)}],
        "volumes": volumes(options),
    }
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
    trainer = {
        "image": options.image,
        "command": ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint"],
        "args": command(folder, options, hosts, f"{name}-node-0-$(HOST_INDEX).{name}"),
        "env": environment(),
        "numNodes": options.nodes,
        "resourcesPerNode": resources(options),
    }
    if options.gpus_per_node:
        trainer["numProcPerNode"] = options.gpus_per_node
    spec = {
        "runtimeRef": {"apiGroup": TRAINER, "kind": "ClusterTrainingRuntime", "name": "torch-distributed"},
        "trainer": trainer,
        "runtimePatches": [
            {
                "manager": "orthogon/launch",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
            }
        ],
    }
    labels = {"app.kubernetes.io/name": "orthogon", **options.labels}
    metadata = {"name": name, "namespace": options.namespace, "labels": labels}
    return [{"apiVersion": f"{TRAINER}/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}]


def grace(config: RunConfig) -> int:
    """Seconds from the signal to the kill of a pod: what ranks promise to save in, and more."""
    return math.ceil(config.guard.stop_timeout) + MORE_SECONDS


def environment() -> list[dict[str, Any]]:
    """The pod's index as a variable, from the annotation that the controller of Indexed Jobs sets."""
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [{"name": "HOST_INDEX", "valueFrom": {"fieldRef": {"fieldPath": path}}}]


def resources(options: Any) -> dict[str, Any]:
    """Requests that are limits, too: a pod is not evicted for what it was given."""
    asked = {"cpu": options.cpu, "memory": options.memory}
    asked |= {"nvidia.com/gpu": str(options.gpus_per_node)} if options.gpus_per_node else {}
    return {"requests": asked, "limits": dict(asked)}


def mounts(options: Any) -> list[dict[str, Any]]:
    """The folder of runs, and shared memory for NCCL and data."""
    return [{"name": "runs", "mountPath": options.mount}, {"name": "shared-memory", "mountPath": "/dev/shm"}]


def volumes(options: Any) -> list[dict[str, Any]]:
    """What `mounts` mounts."""
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
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
            outcome=Outcome.INFRASTRUCTURE,
        )
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(
            f"kubectl does not answer: {error}", where="kubectl", mend="try again", outcome=Outcome.INFRASTRUCTURE
        ) from None


def state(folder: Path, handle: dict[str, Any]) -> tuple[str, str]:
    """What became of a job: (pending, running, ended, vanished or unknown; detail)."""
    try:
        done = kubectl("get", handle["kind"], handle["name"], f"--namespace={handle['namespace']}", "--output=json")
        if done.returncode:
            lost = "NotFound" in done.stderr
            said = (done.stderr.strip().splitlines() or ["kubectl said nothing"])[-1]
            return ("vanished", "there is no such job any more") if lost else ("unknown", said)
        status = json.loads(done.stdout).get("status") or {}
        return _word(status)
    except RunError as error:
        return "unknown", error.what
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return "unknown", f"kubectl's answer is not understood: {type(error).__name__}"


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


def logs(folder: Path, handle: dict[str, Any]) -> list[Path]:
    """Log files of the newest attempt, ranks first; they lie in the run folder, as everywhere."""
    numbers = evidence.attempts(folder)
    place = folder / "logs" / str(numbers[-1]) if numbers else folder / "logs"
    ranks = sorted(place.glob("rank-*.log"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    return [*ranks, *sorted(place.glob("torchrun*.log"))]


def cancel(folder: Path, handle: dict[str, Any], now: bool) -> str:
    """Delete the job: its pods get SIGTERM and the time to save, or with `now` none."""
    kind, name = handle["kind"], handle["name"]
    things = [f"{kind}/{name}", *([f"service/{name}"] if kind == "job" else [])]
    hurry = ["--grace-period=0", "--force"] if now else []
    done = kubectl(
        "delete", *things, f"--namespace={handle['namespace']}", "--wait=false", "--ignore-not-found", *hurry
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["kubectl said nothing"])[-1]
        raise RunError(f"the job was not deleted: {said}", where=name, mend="try again", outcome=Outcome.INFRASTRUCTURE)
    if not done.stdout.strip():
        return f"{kind} {name} is not there any more"
    return f"{kind} {name} is deleted at once" if now else f"{kind} {name} is deleted; its pods save first"
