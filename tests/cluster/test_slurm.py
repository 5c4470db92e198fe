"""Ensembles, dependencies, accounting, and a Slurm that refuses, forgets or does not answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch import handles
from launch.backends import slurm
from launch.slurm import query, rendezvous
from tests.chaos import harness
from tests.cluster.conftest import SETTINGS, Submitted, options
from tests.cluster.hosts import wait_for
from tests.unit.fakes.programs import member_configs
from trainer import config as configuration
from trainer import runfolder
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

pytestmark = pytest.mark.timeout(900)


def test_an_ensemble_is_one_array_and_a_dependent_run_starts_after_its_last_member(idle, place, submit) -> None:
    config = configuration.load(place / "run.yaml", ["--name=member", "--train.length=4 steps", *SETTINGS])
    configs = member_configs(config, 3)
    assert [(one.name, one.seed, one.data.order_seed) for one in configs] == [("member-0", 0, 0), ("member-1", 1, 1), ("member-2", 2, 2)]  # fmt: skip
    members = [(one, runfolder.create(one, ["test"])) for one in configs]
    found = slurm.submit_members(members, options(nodes=1, array_limit=2))
    array = found[0]["job"].partition("_")[0]
    assert [handle["job"] for handle in found] == [f"{array}_{index}" for index in range(3)]
    for (_, folder), handle in zip(members, found, strict=True):
        write_json(folder / handles.FILE, {"backend": "slurm", "options": {}, "attempts": 0, **handle})
    student = submit("student", "--train.length=4 steps", nodes=1, after=tuple(one.name for one in configs))
    assert student.state() == "pending"
    runs = [Submitted(idle, folder, handle) for (_, folder), handle in zip(members, found, strict=True)]
    for run in runs:
        assert run.ends() == "COMPLETED", run.said()
        assert run.outcomes() == ["finished"]
        assert slurm.logs(run.folder, run.handle)[0].name == "rank-0.log"
    assert student.ends() == "COMPLETED", student.said()
    table = idle.ask("sacct", "-XnP", f"--jobs={array},{student.job}", "--format=JobID,Start,End")
    times = {line.split("|")[0]: line.split("|")[1:] for line in table.splitlines()}
    assert all(times[run.job][1] <= times[student.job][0] for run in runs)
    losses = [harness.history(run.folder)[0]["loss"] for run in runs]
    assert len(set(losses)) == 3  # members differ by their seeds


def test_a_failed_run_is_not_tried_for_ever_and_starts_nothing_that_waits_for_it(idle, submit) -> None:
    run = submit("bad", "--model.init_from=" + str(Path(__file__).parent), "--data.tokenizer.path=/nowhere", nodes=1)
    after = submit("after", nodes=1, after=("bad",))
    assert run.ends() == "FAILED", run.said()
    assert run.outcomes() == ["bad configuration"]
    assert after.ends(60) == "CANCELLED"
    assert not after.outcomes()


def test_states_come_from_whichever_command_is_there(idle, monkeypatch, tmp_path) -> None:
    job = idle.ask("sbatch", "--parsable", "--wrap=exit 3", "--output=/dev/null")
    handle = {"job": job, "time": 0.0}
    wait_for(lambda: slurm.state(tmp_path, handle)[0] == "ended", 30, "its end")
    wait_for(lambda: idle.ask("sacct", "-XnP", f"--jobs={job}", "--format=State") == "FAILED", 30, "accounting")
    for left in ("squeue", "sacct", "scontrol"):
        folder = tmp_path / left
        folder.mkdir()
        (folder / left).symlink_to(idle.folder / "bin" / left)
        for tool in ("sh", "grep", "readlink", "nsenter"):
            (folder / tool).symlink_to(str(shutil.which(tool)))
        monkeypatch.setenv("PATH", str(folder))
        kind, detail = slurm.state(tmp_path, handle)
        assert (kind, detail.partition(",")[0]) == ("ended", "FAILED"), left
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.state(tmp_path, handle)[0] == "unknown"


def test_many_jobs_are_asked_for_at_once_and_unknown_ones_have_vanished(idle, tmp_path) -> None:
    jobs = [idle.ask("sbatch", "--parsable", "--wrap=sleep 60", "--output=/dev/null") for _ in range(3)]
    answers = slurm.states([(tmp_path, {"job": job, "time": 0.0}) for job in [*jobs, "999999"]])
    assert {kind for kind, _ in answers[:3]} <= {"pending", "running"}
    assert answers[3] == ("vanished", "Slurm knows no job 999999 any more")
    idle.ask("scancel", *jobs)


def test_a_refused_job_is_one_sentence(idle, submit) -> None:
    for asked, words in (({"partition": "hihg"}, "partition"), ({"nodes": 5}, "[Nn]ode"), ({"gres": "gpu:9"}, "")):
        with pytest.raises(RunError, match="Slurm does not take the job.*" + words) as error:
            submit(f"refused-{next(iter(asked))}", **asked)
        assert error.value.outcome is Outcome.BAD_CONFIGURATION


def test_a_dead_controller_is_told_and_jobs_are_known_again_after_it(idle, submit) -> None:
    run = submit("alone", "--train.length=20 steps", nodes=1, slow=1.0)
    run.trains(1, ranks=1)  # until it has kept its state: a job that it forgets in a crash has vanished
    idle.kill_daemon("head", "slurmctld")
    try:
        kind, detail = slurm.state(run.folder, run.handle)
        assert kind == "unknown"
        assert "controller does not answer" in detail
        with pytest.raises(RunError, match="was not cancelled"):
            slurm.cancel(run.folder, run.handle, False)
        with pytest.raises(query.Silent) as error:
            submit("nobody-home")
        assert error.value.outcome is Outcome.INFRASTRUCTURE
    finally:
        idle.controller_up()
    assert run.ends() == "COMPLETED", run.said()


def test_names_of_nodes_are_expanded_as_scontrol_does(idle) -> None:
    for text in ("n1", "n[1-3]", "n[1,3-4],gpu-[08-11,20]", "r[01-02],head,r[98-101]"):
        assert (
            rendezvous.expand(text) == idle.ask("scontrol", "show", "hostnames", text).split() == rendezvous.hosts(text)
        )


def test_secrets_do_not_reach_slurms_records(idle, submit, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter22")
    run = submit("secret", "--train.length=4 steps", nodes=1)
    shown = idle.ask("scontrol", "show", "job", run.job) + idle.ask("scontrol", "write", "batch_script", run.job, "-")
    state = [path for path in (idle.folder / "state").rglob("environment") if b"hunter22" in path.read_bytes()]
    assert "slurm.env" in shown
    assert "hunter22" not in shown
    assert not state
    assert "hunter22" in (run.folder / "slurm.env").read_text()
    slurm.cancel(run.folder, run.handle, True)
    run.ends(60)
