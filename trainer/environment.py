"""Which rank this process is, by whoever started it. Imports no torch."""

from __future__ import annotations

from collections.abc import MutableMapping

from trainer.outcome import RunError

FORKED = "ORTHOGON_FORKED"
"""In the environment of a rank that its supervisor forked: the only one of its run."""


def adopt(environment: MutableMapping[str, str]) -> str:
    """Say who started this rank, and describe it as torch expects (RANK, LOCAL_RANK, WORLD_SIZE) where that is not done.

    `srun` starts one task per rank and numbers them. Only a job step counts: the batch script, and what a person starts
    in an allocation, carry SLURM_PROCID and SLURM_NTASKS, too, and are no ranks. A step of one task that nobody told where
    ranks meet is a process by itself.

    Returns:
        "torchrun", "srun", "fork" (a supervisor with all imports), "other" (RANK is set by somebody else), or "" for a process by itself.

    Raises:
        RunError: several tasks that were not told where they meet: each would train alone, or wait for ever.
    """
    if FORKED in environment:
        for name in [*environment]:  # of a job around it, which this rank is no part of
            if name.startswith(("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")) or name.endswith("_WORLD_SIZE"):
                del environment[name]
        environment.pop("WORLD_SIZE", None)
        environment["RANK"] = environment["LOCAL_RANK"] = "0"
        return "fork"
    if "RANK" in environment:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "other"
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"} <= environment.keys():
        return ""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        if tasks == "1":
            return ""
        raise RunError(
            f"srun started {tasks} tasks that do not know where they meet",
            where="MASTER_ADDR, MASTER_PORT",
            mend='use `orthogon submit --on slurm`, or export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" '
            "| head -n1) and a free MASTER_PORT before srun",
        )
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], tasks
    # With --gpus-per-task each task sees one device, which is number 0 to it.
    alone = len([name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]) == 1
    environment["LOCAL_RANK"] = "0" if alone else environment["SLURM_LOCALID"]
    return "srun"
