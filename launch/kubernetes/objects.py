"""The objects that a run is in Kubernetes, as JSON values, and the options that they are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from launch import evidence
from trainer.files import digest
from trainer.outcome import Outcome, RunError
from trainer.registry import STRICT

if TYPE_CHECKING:
    from trainer.config import RunConfig

MORE_SECONDS = 60
"""What a pod gets beyond the time in which ranks promise to answer a signal."""
DETERMINISTIC = (Outcome.DIVERGED, Outcome.OUT_OF_DATA, Outcome.NO_SPACE, Outcome.BAD_CONFIGURATION)
RESTARTS = 6
"""Pods that may be lost to infrastructure before the job fails; preempted ones do not count."""
TRAINER = "trainer.kubeflow.org"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a cluster is asked for."""

    __pydantic_config__ = STRICT
    image: str = ""
    """The image of the pods, see docker/README.md."""
    nodes: Annotated[int, Gt(0)] = 1
    """Pods; each runs the ranks of one node."""
    gpus_per_node: Annotated[int, Ge(0)] = 0
    """GPUs of each pod (`nvidia.com/gpu`); 0 asks for none."""
    cpu: str = "4"
    """CPUs of each pod, as Kubernetes writes them."""
    memory: str = "16Gi"
    """Memory of each pod."""
    namespace: str = "default"
    """Where in the cluster the job is made."""
    claim: str = ""
    """The volume claim (ReadWriteMany) that holds the folder of runs."""
    mount: str = "/work/runs"
    """Where pods see the folder of runs."""
    kind: Literal["job", "trainjob"] = "job"
    """An Indexed Job, or a Kubeflow TrainJob on the runtime `torch-distributed`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of the job and its pods, e.g. that of a queue."""


def objects(config: RunConfig, folder: Path, options: Options) -> list[dict[str, Any]]:
    """All that is created for a run.

    Raises:
        RunError: as `check`.
    """
    check(config, options)
    return train_job(config, folder, options) if options.kind == "trainjob" else job(config, folder, options)


def check(config: RunConfig, options: Options) -> None:
    """Options that make a job for this run.

    Raises:
        RunError: no image or volume, a path that is not absolute, or another number of ranks than of GPUs.
    """
    wrong = ""
    if not options.image or not options.claim:
        wrong = f"{'image' if not options.image else 'claim'} is missing"
    elif not options.mount.startswith("/"):
        wrong = f"mount is '{options.mount}', which is no absolute path"
    elif options.gpus_per_node and config.resources.ranks not in (None, options.gpus_per_node):
        wrong = f"resources.ranks is {config.resources.ranks} and gpus_per_node is {options.gpus_per_node}"
    if wrong:
        raise RunError(
            f"kubernetes: {wrong}",
            where="command line or cluster file",
            mend="give it as --image, --claim, --mount ... or in a cluster file",
        )


def job_name(folder: Path) -> str:
    """A name that Kubernetes takes (a DNS label, with room for the index of a pod): that of the run and its next attempt."""
    label = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if label != folder.name or len(label) > 40:
        label = f"{label[:32].strip('-')}-{digest(folder.name)[:6]}"
    number = evidence.newest_attempt(folder) + 1
    return f"orthogon-{label}-{number}"


def command(folder: Path, options: Options, hosts: Sequence[str], host: str) -> list[str]:
    """The arguments of `orthogon` in a pod; the index is filled in by Kubernetes."""
    return ["node", folder.name, f"--runs={options.mount}", f"--hosts={','.join(hosts)}", f"--host={host}"]


def job(config: RunConfig, folder: Path, options: Options) -> list[dict[str, Any]]:
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


def train_job(config: RunConfig, folder: Path, options: Options) -> list[dict[str, Any]]:
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


def resources(options: Options) -> dict[str, Any]:
    """Requests that are limits, too: a pod is not evicted for what it was given."""
    asked = {"cpu": options.cpu, "memory": options.memory}
    asked |= {"nvidia.com/gpu": str(options.gpus_per_node)} if options.gpus_per_node else {}
    return {"requests": asked, "limits": dict(asked)}


def mounts(options: Options) -> list[dict[str, Any]]:
    """The folder of runs, and shared memory for NCCL and data."""
    return [{"name": "runs", "mountPath": options.mount}, {"name": "shared-memory", "mountPath": "/dev/shm"}]


def volumes(options: Options) -> list[dict[str, Any]]:
    """What `mounts` mounts."""
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
