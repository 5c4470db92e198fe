"""An emulated cluster to try things on: `python -m tests.cluster FOLDER [COMMAND ...]` starts a shell in which `sinfo`, `sbatch` and
`orthogon submit --on slurm` reach it; leaving the shell takes it down."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.packages import reason_not_to


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made; logs stay in it")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=0, help="devices that each node claims to have")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="instead of a shell")
    given = parser.parse_args()
    reason = reason_not_to()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    with Cluster(given.folder.absolute(), given.nodes, gpus=given.gpus) as cluster:
        command = given.command or [os.environ.get("SHELL", "/bin/sh")]
        return subprocess.run(command, env=os.environ | cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
