"""Runs that are submitted to a real Slurm equal the same runs started by hand, whatever Slurm does to them meanwhile."""

from __future__ import annotations

import pytest

from launch import handles
from launch.backends import slurm
from launch.slurm import suspects
from tests.cluster.conftest import Submitted, options
from tests.cluster.hosts import wait_for
from trainer import config as configuration
from trainer.outcome import RunError

pytestmark = pytest.mark.timeout(1200)
BOTH = pytest.mark.parametrize("start", ["srun", "torchrun"])


def high(cluster, seconds: int) -> str:
    """A job that takes all nodes from those of the partition `low`."""
    wrap = f"--wrap=sleep {seconds}"
    return cluster.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", wrap
    )


@BOTH
def test_two_nodes_train_as_two_local_ranks(submit, calm, start) -> None:
    run = submit(f"two-{start}", start=start)
    assert run.ends() == "COMPLETED", run.said()
    assert run.accounted() == ["COMPLETED"]
    assert run.outcomes() == ["finished"]
    run.equals(calm)
    facts = run.facts(1)
    assert facts["address"] == facts["nodes"][0]
    assert 20000 <= facts["port"] < 32000
    assert "figures" in (run.folder / f"logs/slurm-{run.job}.out").read_text()  # what follows a finished run
    assert (run.folder / "slurm.env").stat().st_mode & 0o777 == 0o600


@BOTH
def test_a_preempted_run_saves_is_requeued_and_ends_the_same(submit, idle, calm, start) -> None:
    run = submit(f"preempted-{start}", start=start, slow=0.4)
    run.trains(8)
    high(idle, 5)
    run.until(lambda: run.state() == "pending", 60)
    assert run.ends() == "COMPLETED", run.said()
    assert run.outcomes() == ["preempted", "finished"], run.said()
    first = run.records()[0]
    assert first["checkpoint"] >= 8
    assert first["step"] == first["checkpoint"]  # nothing was lost
    assert not first["asked"]
    assert run.accounted()[0] in ("REQUEUED", "PREEMPTED")
    assert run.accounted()[-1] == "COMPLETED"
    run.equals(calm)


@BOTH
def test_a_run_outlives_two_time_limits(submit, calm, start) -> None:
    # Told 65 s, and up to 30 s more, before the limit of 180 s: 60 slow steps take longer than that.
    run = submit(f"limit-{start}", start=start, slow=5.0, attempts=(1, 2), time="3")
    assert run.ends(900) == "COMPLETED", run.said()
    assert run.outcomes() == ["preempted", "preempted", "finished"], run.said()
    steps = [record["checkpoint"] for record in run.records()]
    assert 0 < steps[0] < steps[1] < steps[2]
    assert run.accounted() == ["REQUEUED", "REQUEUED", "COMPLETED"]
    run.equals(calm)


def test_a_node_that_loses_power_is_suspected_and_the_run_goes_on_elsewhere(submit, idle, calm) -> None:
    run = submit("power", slow=0.3)
    run.trains(8)
    lost = run.facts(1)["nodes"][1]
    idle.hosts.power_off(lost)
    assert run.ends() == "COMPLETED", run.said()
    assert run.outcomes()[-1] == "finished"
    assert run.records()[0]["outcome"] in ("infrastructure", "preempted")
    assert lost not in run.facts(len(run.outcomes()))["nodes"]
    assert lost in suspects.read(run.folder.parent), run.said()
    run.equals(calm)
    assert f"--exclude={lost}" in slurm.describe(configuration.load(run.folder / "config.yaml"), run.folder, options())
    (run.folder.parent / suspects.FILE).unlink()


@pytest.mark.parametrize("which", [0, 1])
def test_a_node_whose_slurmd_dies_does_not_lose_the_run(submit, idle, calm, which) -> None:
    # Slurm notices after 15 to 30 s. Until then, and beyond on the node that it cannot reach, the attempt goes on.
    run = submit(f"daemon-{which}", slow=1.5, attempts=(1,))
    run.trains(8)
    lost = run.facts(1)["nodes"][which]
    idle.kill_daemon(lost)
    assert run.ends() == "COMPLETED", run.said()
    assert run.outcomes()[-1] == "finished"
    assert len(run.outcomes()) >= 2, run.said()
    assert run.accounted() == ["NODE_FAIL", "COMPLETED"]
    run.equals(calm)
    (run.folder.parent / suspects.FILE).unlink(missing_ok=True)


def test_a_killed_rank_is_started_again_on_the_same_nodes(submit, calm) -> None:
    run = submit("killed", "--checkpoint.every=5 steps", slow=0.1, environment=())
    run.trains(7)
    pid = rank_process(run, 1)
    run.cluster.hosts.inside(run.facts(1)["nodes"][1], "kill", "-9", str(pid))
    assert run.ends() == "COMPLETED", run.said()
    assert run.outcomes() == ["infrastructure", "finished"], run.said()
    assert "rank 1 was killed by SIGKILL" in run.records()[0]["message"]
    assert run.facts(2)["restart"] == 0  # within the same start of the job
    assert run.accounted() == ["COMPLETED"]
    run.equals(calm)


def rank_process(run: Submitted, rank: int) -> int:
    """The process of a rank of the first attempt, as this machine numbers it."""
    from pathlib import Path

    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainer" in line and str(run.folder).encode() in line and f"SLURM_PROCID={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(run.said())


def test_a_cancelled_run_saves_ends_and_can_be_resumed(submit, idle, calm) -> None:
    run = submit("cancelled", slow=0.3)
    config = configuration.load(run.folder / "config.yaml")
    with pytest.raises(RunError, match="is pending already|is running already|being written"):
        handles.start(config, run.folder, "slurm", options(), resume=True)
    run.trains(8)
    dependent = idle.ask(
        "sbatch", "--parsable", f"--dependency=afterok:{run.job}", "--kill-on-invalid-dep=yes", "--wrap=true", "--output=/dev/null"
    )  # fmt: skip
    assert slurm.cancel(run.folder, run.handle, False) == f"asked run cancelled (job {run.job}) to save and end"
    assert run.ends(60) == "FAILED"  # exit code 75: nothing that waits for it may start
    assert run.outcomes() == ["preempted"]
    record = run.records()[0]
    assert record["asked"]
    assert record["checkpoint"] == record["step"] >= 8
    wait_for(lambda: idle.ask("squeue", "--noheader", f"--jobs={dependent}") == "", 30, "the end of the dependent job")
    assert "is over" in slurm.cancel(run.folder, run.handle, False)
    again = Submitted(idle, run.folder, handles.start(config, run.folder, "slurm", options(), resume=True))
    assert again.ends() == "COMPLETED", again.said()
    again.equals(calm)


def test_a_run_is_cancelled_now_and_a_waiting_one_at_once(submit, idle) -> None:
    blocking = high(idle, 600)
    run = submit("waiting")
    run.until(lambda: run.state() == "pending", 30)
    assert slurm.cancel(run.folder, run.handle, False) == f"cancelled run waiting (job {run.job})"
    assert run.ends(30) == "CANCELLED"
    idle.ask("scancel", blocking)
    run = submit("now", slow=0.3)
    run.trains(3)
    assert slurm.cancel(run.folder, run.handle, True).startswith(f"cancelled run now (job {run.job})")
    assert run.ends(60) == "CANCELLED"
    assert "finished" not in run.outcomes()
