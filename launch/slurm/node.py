"""One node's part of an attempt where torchrun starts the ranks: `srun` runs this once per node.

It watches its torchrun as `orthogon run` does, so that one which outlives its ranks is ended. Attempts follow one another by
the batch script, hence there is no policy here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch import attempt, children, evidence
from launch.backends import torchrun
from trainer import runfolder
from trainer.outcome import Outcome


def options(environment: Mapping[str, str]) -> tuple[str, ...]:
    """torchrun's options on this node: the static rendezvous, whose host is the job's first node."""
    return (
        f"--nnodes={environment['SLURM_STEP_NUM_NODES']}", f"--node-rank={environment['SLURM_NODEID']}",
        f"--rdzv-id={environment['SLURM_JOB_ID']}", f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="processes on this node")
    given = parser.parse_args()
    with children.Asked() as asked:
        config = runfolder.open_run(given.folder)
        config = replace(config, resources=replace(config.resources, ranks=given.ranks))
        logs = given.folder / "logs" / str(given.attempt)
        name = f"torchrun-{os.environ['SLURMD_NODENAME']}.log"
        line = torchrun.attempt_command(config, given.folder, given.attempt, options(os.environ))
        with open(logs / name, "w", encoding="utf-8") as log:
            child = children.start(line, log, torchrun.variables(config))
            try:
                ended = attempt.watch(child, logs, name, asked)
            except BaseException:
                children.end(child)
                raise
    outcome = evidence.told(logs)
    orderly = outcome is not None and Outcome(outcome["outcome"]).orderly
    if ended:
        print(f"torchrun was ended on {os.environ['SLURMD_NODENAME']}: {ended}", file=sys.stderr)
    return 0 if orderly else Outcome.INFRASTRUCTURE.code  # another code makes srun end the other nodes


if __name__ == "__main__":
    sys.exit(main())
