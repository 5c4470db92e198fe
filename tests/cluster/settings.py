"""The configuration of an emulated cluster: slurm.conf and what lies beside it.

What is set against the default, and why, stands beside it; waiting times are cut so that tests see in seconds what a real
cluster does in minutes. `docs/slurm.md` says what was learnt with it.
"""

from __future__ import annotations

import os
import pwd
import secrets
from pathlib import Path

from tests.cluster.hosts import HEAD, address

CONTROLLER, DATABASE, ACCOUNTING, NODE = 6817, 6819, 6820, 6818
KILL_WAIT = GRACE = 5
"""Seconds between TERM and KILL, and those that a preempted job gets before."""


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def slurm(folder: Path, nodes: list[str], cpus: int, gpus: int) -> str:
    """slurm.conf."""
    run, log = folder / "run", folder / "log"
    values: dict[str, object] = {
        "ClusterName": "local", "SlurmctldHost": f"head({HEAD})", "SlurmctldPort": CONTROLLER, "SlurmdPort": NODE,
        # Of a requeued job: the default keeps it from starting again for two minutes.
        "AuthInfo": f"socket={run}/munge/socket,cred_expire=5", "AuthType": "auth/munge", "CredType": "cred/munge",
        "SlurmUser": user(), "SlurmdUser": user(),
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool/%n",
        "SlurmctldPidFile": run / "slurmctld.own", "SlurmdPidFile": run / "slurmd.%n.own",
        "SlurmctldLogFile": log / "slurmctld.log", "SlurmdLogFile": log / "slurmd.%n.log",
        # No cgroups: they belong to whoever runs this machine.
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none", "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/linux", "JobAcctGatherFrequency": 10,
        "PropagateResourceLimits": "NONE", "MailProg": "/bin/true",
        "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SlurmdParameters": "config_overrides",
        "SchedulerType": "sched/backfill", "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "PriorityType": "priority/basic", "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
        "JobRequeue": 1, "ReturnToService": 2, "KillWait": KILL_WAIT, "SlurmdTimeout": 10, "SlurmctldTimeout": 10,
        "MessageTimeout": 10, "BatchStartTimeout": 20, "InactiveLimit": 60, "CompleteWait": 0, "MinJobAge": 300,
        "AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": HEAD,
        "AccountingStoragePort": ACCOUNTING,
        # The socket again: the way to slurmdbd does not look at AuthInfo.
        "AccountingStoragePass": run / "munge/socket",
    }  # fmt: skip
    if gpus:
        values |= {"GresTypes": "gpu", "AccountingStorageTRES": "gres/gpu"}
    lines = [f"{key}={value}" for key, value in values.items()]
    each = f"CPUs={cpus} SocketsPerBoard=1 Boards=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=1000000"
    each += f" Gres=gpu:{gpus}" if gpus else ""
    lines += [f"NodeName={name} NodeAddr={address(name)} {each} State=UNKNOWN" for name in nodes]
    lines += [
        f"PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE}",
        "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def accounting(folder: Path) -> str:
    """slurmdbd.conf."""
    run = folder / "run"
    return (
        f"AuthType=auth/munge\nAuthInfo=socket={run}/munge/socket\nDbdHost=head\nDbdAddr={HEAD}\nDbdPort={ACCOUNTING}\n"
        f"SlurmUser={user()}\nLogFile={folder}/log/slurmdbd.log\nPidFile={run}/slurmdbd.own\n"
        f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={DATABASE}\nStorageUser=root\n"
        "StorageLoc=slurm_acct_db\n"
    )


def write(folder: Path, nodes: list[str], cpus: int, gpus: int) -> Path:
    """Write all files; returns slurm.conf."""
    for name in ("etc", "state", "spool", "dev"):
        (folder / name).mkdir()
    etc = folder / "etc"
    with os.fdopen(os.open(etc / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as key:
        key.write(secrets.token_bytes(1024))
    (etc / "slurm.conf").write_text(slurm(folder, nodes, cpus, gpus))
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n")
    (etc / "slurmdbd.conf").write_text(accounting(folder))
    (etc / "slurmdbd.conf").chmod(0o600)
    if gpus:
        for number in range(gpus):  # slurmd wants character devices, and numbers them by these names
            (folder / f"dev/nvidia{number}").symlink_to("/dev/null")
        devices = "\n".join(f"Name=gpu File={folder}/dev/nvidia{number}" for number in range(gpus))
        (etc / "gres.conf").write_text(f"AutoDetect=off\n{devices}\n")
    return etc / "slurm.conf"
