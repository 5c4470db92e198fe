"""A real Slurm of a few emulated nodes: slurmctld, slurmdbd on MariaDB, a slurmd and a munged per node."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from tests.cluster import settings
from tests.cluster.hosts import Hosts, plain, started, wait_for
from tests.cluster.packages import program

CLIENTS = ("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
WRAPPER = """\
#!/bin/sh
# {name} in the cluster's network; inside of a job it is there already
if grep -qxF "$(readlink /proc/self/ns/net)" {run}/netns; then exec {real} "$@"; fi
[ -e /proc/{head}/ns/net ] || {{ echo "the emulated cluster is down" >&2; exit 1; }}
exec nsenter --net=/proc/{head}/ns/net -- {real} "$@"
"""


class Cluster:
    """A context manager: the cluster is up inside of it, with its commands in `environment`."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 4, gpus: int = 0) -> None:
        self.folder = folder
        self.hosts = Hosts(folder, nodes)
        self.nodes = self.hosts.names
        self.conf = settings.write(folder, self.nodes, cpus, gpus)
        self.daemons: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    @property
    def environment(self) -> dict[str, str]:
        """What a shell of the login node needs."""
        return {"SLURM_CONF": str(self.conf), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}

    def ask(self, *words: str) -> str:
        """The answer of one of Slurm's commands."""
        return subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        ).stdout.strip()  # fmt: skip

    def node_states(self) -> dict[str, str]:
        lines = self.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def kill_daemon(self, node: str, service: str = "slurmd") -> None:
        """SIGKILL to one daemon; the node's jobs live on."""
        pid, since = self.daemons[f"{node}.{service}"]
        assert started(pid) == since, f"{service} on {node} is dead"
        os.kill(pid, signal.SIGKILL)

    def node_up(self, node: str) -> None:
        """Switch a node on if it is off, and start its daemons."""
        if self.hosts.first(node) is None:
            self.hosts.power_on(node)
        self._munged(node)
        self._start(node, "slurmd", ["slurmd", "-D", "-f", str(self.conf), "-N", node])

    def controller_up(self) -> None:
        self._start("head", "slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        wait_for(lambda: "is UP" in self.ask("scontrol", "ping"), 60, "slurmctld")

    def all_idle(self, seconds: float = 90) -> None:
        """Wait until every node waits for work, what has fallen out switched on again."""
        for node in self.nodes:
            self.node_up(node)

        def idle() -> bool:
            return set(self.node_states().values()) == {"idle"}

        wait_for(idle, seconds, "idle nodes")

    def down(self) -> None:
        for name in reversed(["head", *self.nodes]):
            self.hosts.power_off(name)

    def _up(self) -> None:
        self.hosts.power_on("head")
        self._wrappers()
        self._munged("head")
        self._database()
        for node in self.nodes:
            self.hosts.power_on(node)
        socket = self.folder / "run/db.sock"
        wait_for(socket.exists, 90, "the database")
        self._start("head", "slurmdbd", ["slurmdbd", "-D"])
        wait_for(lambda: "local" in self._registered(), 90, "slurmdbd")
        self.controller_up()
        self.all_idle()

    def _registered(self) -> str:
        self.ask("sacctmgr", "--immediate", "add", "cluster", "local")
        return self.ask("sacctmgr", "--noheader", "--parsable2", "list", "cluster")

    def _start(self, host: str, service: str, line: list[str], before: str = "") -> None:
        pid, since = self.daemons.get(f"{host}.{service}", (0, 0))
        if pid and started(pid) == since:
            return
        path = program(line[0])
        assert path is not None, line[0]
        pid = self.hosts.start(host, service, [path, *line[1:]], plain(SLURM_CONF=str(self.conf)), before)
        self.daemons[f"{host}.{service}"] = (pid, started(pid) or 0)

    def _munged(self, host: str) -> None:
        inside, key = self.hosts.munge("head"), self.folder / "etc/munge.key"  # every host sees its own there
        line = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={inside}/socket",
                f"--pid-file={inside}/pid", f"--seed-file={inside}/seed", f"--log-file={inside}/log"]  # fmt: skip
        self._start(host, "munged", line)
        wait_for((self.hosts.munge(host) / "socket").exists, 20, f"munged on {host}")

    def _database(self) -> None:
        data = self.folder / "db"
        data.mkdir()
        quoted = shlex.quote(str(data))
        # In memory: on a disk the system tables alone take four seconds. Temporary names are made of process numbers, which
        # two clusters have in common: each needs a folder of its own for them.
        before = (
            f"mount -t tmpfs tmpfs {quoted}\nmkdir {quoted}/tmp\n"
            f"mariadb-install-db --no-defaults --datadir={quoted}/data --tmpdir={quoted}/tmp --user={settings.user()} "
            "--skip-test-db --auth-root-authentication-method=normal --innodb-log-file-size=8M >/dev/null 2>&1\n"
        )
        line = [
            "mariadbd", "--no-defaults", f"--datadir={data}/data", f"--tmpdir={data}/tmp", f"--socket={self.folder}/run/db.sock",
            f"--pid-file={self.folder}/run/db.own", "--bind-address=127.0.0.1", f"--port={settings.DATABASE}",
            f"--user={settings.user()}", "--skip-grant-tables", "--skip-name-resolve", "--skip-log-bin",
            "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0",
            "--innodb-flush-method=nosync", "--innodb-lock-wait-timeout=900", "--performance-schema=OFF",
        ]  # fmt: skip
        self._start("head", "mariadbd", line, before)

    def _wrappers(self) -> None:
        (self.folder / "bin").mkdir()
        for name in CLIENTS:
            path = self.folder / "bin" / name
            real = shlex.quote(program(name) or shutil.which(name) or name)
            run = shlex.quote(str(self.folder / "run"))
            path.write_text(WRAPPER.format(name=name, run=run, real=real, head=self.hosts.first("head")))
            path.chmod(0o755)
