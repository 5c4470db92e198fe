"""Submitting and cancelling against recorded answers; what the batch script does at the start and the end of attempts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import handles
from launch.backends import slurm
from launch.process import ROOT
from launch.slurm import job, query, suspects
from tests.unit.fakes.programs import Fakes, member_configs
from trainer import config as configuration
from trainer import runfolder
from trainer.files import write_json
from trainer.outcome import Outcome, RunError, write_outcome

JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "low"}
RUNNING = "JobId=17 JobState=RUNNING Restarts=0 ExcNodeList=(null)"


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Fakes:
    found = Fakes(tmp_path, monkeypatch)
    found.answer("squeue", "squeue")
    found.answer("sacct", "sacct")
    found.answer("sinfo", "sinfo")
    found.answer("scancel", "nothing")
    found.answer("sbatch", "sbatch", __test_only="test-only-good")
    found.says("scontrol", RUNNING)
    monkeypatch.setattr(job.rendezvous, "hosts", lambda text: job.rendezvous.expand(text) if text != "(null)" else [])
    return found


@pytest.fixture
def made(tmp_path) -> tuple[configuration.RunConfig, Path]:
    config = configuration.load(ROOT / "configs/quickstart.yaml", [f"--runs={tmp_path}/runs", "--name=x"])
    return config, runfolder.create(config, [])


def test_submit_writes_all_into_the_run_folder_and_returns_a_handle(fakes, made) -> None:
    config, folder = made
    options = slurm.Options(nodes=2)
    handle = slurm.submit(config, folder, options, resume=False)
    assert handle["job"] == "12"
    assert handle["output"] == f"{folder}/logs/slurm-12.out"
    assert (folder / "slurm.sbatch").read_text() == slurm.describe(config, folder, options)
    assert (folder / "slurm.env").stat().st_mode & 0o777 == 0o600
    calls = [line for line in fakes.calls() if line.startswith("sbatch")]
    assert calls == [f"sbatch --test-only {folder}/slurm.sbatch", f"sbatch --parsable {folder}/slurm.sbatch"]
    fakes.answer("scontrol", "scontrol-unknown")
    assert slurm.state(folder, handle) == ("pending", "Slurm does not show it yet")


def test_a_job_waits_for_runs_by_name_and_refuses_those_that_will_not_finish(fakes, made) -> None:
    config, folder = made
    before = {name: runfolder.create(replace(config, name=name), []) for name in ("a", "b", "c", "d")}
    for number, name in enumerate("abd", 20):
        fakes.says("sbatch", str(number))
        handles.start(config, before[name], "slurm", slurm.Options(), resume=False)
    fakes.says("squeue", "20|COMPLETED|None|n1\n21|PENDING|Priority|\n22|FAILED|NonZeroExitCode|n1")
    for name, outcome in (("a", Outcome.FINISHED), ("d", Outcome.DIVERGED)):
        write_outcome(before[name] / f"logs/{runfolder.new_attempt(before[name])}", outcome, "so", rank=0, step=3)
    slurm.submit(config, folder, slurm.Options(), resume=False, after=["a", "b"])
    text = (folder / "slurm.sbatch").read_text()
    assert "#SBATCH --dependency=afterok:21\n" in text
    assert text.replace("#SBATCH --dependency=afterok:21\n", "") == slurm.describe(config, folder, slurm.Options())
    for name, what in (("c", "run c is no job of Slurm"), ("d", "run d is not going to finish: diverged: so")):
        with pytest.raises(RunError, match=what):
            slurm.submit(config, folder, slurm.Options(), resume=False, after=["a", name])


def test_an_array_has_a_handle_for_each_member(fakes, made, tmp_path) -> None:
    members = [(one, runfolder.create(one, [])) for one in member_configs(made[0], 3)]
    fakes.says("sbatch", "3;other")
    found = slurm.submit_members(members, slurm.Options())
    assert [handle["job"] for handle in found] == ["3_0", "3_1", "3_2"]
    assert {handle["cluster"] for handle in found} == {"other"}
    assert found[2]["output"] == f"{members[0][1]}/logs/slurm-3_2.out"
    pairs = list(zip([folder for _, folder in members], found, strict=True))
    assert [kind for kind, _ in slurm.states(pairs)] == ["running", "pending", "pending"]
    assert all((folder / "slurm.env").exists() for _, folder in members)


@pytest.mark.parametrize(
    ("recorded", "what", "code"),
    [("test-only-partition", "Slurm does not take the job: invalid partition specified: hihg; allocation failure: Invalid partition name specified", 78),
     ("test-only-nodes", "Slurm does not take the job: allocation failure: Requested node configuration is not available", 78),
     ("sbatch-down", "Slurm's controller does not answer: Batch job submission failed: Unable to contact slurm controller (connect failure)", 69)],
)  # fmt: skip
def test_what_slurm_says_against_a_job_is_one_sentence(fakes, made, recorded, what, code) -> None:
    fakes.answer("sbatch", "sbatch", __test_only=recorded)
    with pytest.raises(RunError) as error:
        handles.start(*made, "slurm", slurm.Options(), resume=False)
    assert (error.value.what, error.value.outcome.code) == (what, code)
    assert handles.read(made[1]) is None  # it can be submitted again


def test_a_run_has_one_job_at_a_time_and_suspects_are_excluded(fakes, made) -> None:
    config, folder = made
    handles.start(config, folder, "slurm", slurm.Options(), resume=False)
    fakes.says("squeue", "12|PENDING|Priority|")
    with pytest.raises(RunError, match="run x is pending already on slurm: PENDING, waits: Priority"):
        handles.start(config, folder, "slurm", slurm.Options(), resume=False)
    fakes.says("squeue", "12|COMPLETED|None|n1")
    suspects.add(folder, "12", {"n3": "it is down*"})
    handles.start(config, folder, "slurm", slurm.Options(nodes=2), resume=True)
    assert "#SBATCH --exclude=n3" in (folder / "slurm.sbatch").read_text()


@pytest.mark.parametrize(
    ("number", "now", "call", "said"),
    [("3_0", False, "scancel --batch --signal=USR1 3_0", "asked run x (job 3_0) to save and end"),
     ("3_0", True, "scancel 3_0", "cancelled run x (job 3_0); steps since the newest checkpoint are lost"), ("3_1", False, "scancel 3_1", "cancelled run x (job 3_1)"),
     ("1", False, None, "run x is not running: job 1 is over: COMPLETED, on n1")],
)  # fmt: skip
def test_cancel_saves_a_running_job_first(fakes, made, number, now, call, said) -> None:
    assert slurm.cancel(made[1], {"job": number, "time": 0.0}, now) == said
    assert ([line for line in fakes.calls() if "scancel" in line] or [None])[-1] == call
    assert job.cancelled(made[1], number) == (call is not None)


def test_a_cancellation_that_slurm_refuses_leaves_no_note(fakes, made) -> None:
    for recorded, words in (
        ("test-only-nodes", "not cancelled: allocation failure"),
        ("sbatch-down", "controller does not"),
    ):
        fakes.answer("scancel", recorded)
        with pytest.raises(RunError, match=words):
            slurm.cancel(made[1], {"job": "3_0", "time": 0.0}, False)
        assert not job.cancelled(made[1], "3_0")


def ended(folder: Path, number: int, outcome: Outcome, message: str = "so", step: int = 0, **facts: Any) -> None:
    """What a rank leaves, with a checkpoint of that step."""
    write_outcome(folder / f"logs/{number}", outcome, message, rank=0, step=step, **facts)


@pytest.fixture
def checkpoint(monkeypatch) -> dict[str, int]:
    """The step of the newest checkpoint, as the test says."""
    steps = {"step": 0}
    monkeypatch.setattr("launch.evidence.newest_checkpoint", lambda folder: steps["step"] or None)
    return steps


def test_an_attempt_begins_with_what_its_ranks_must_know(fakes, made, checkpoint) -> None:
    answer = job.begin(made[1], JOB)
    assert answer["attempt"] == "1"
    assert answer["over"] == ""
    assert answer["MASTER_ADDR"] == "n1"
    facts = json.loads((made[1] / "logs/1/slurm.json").read_text())
    assert (facts["job"], facts["nodes"], facts["start"], facts["restart"]) == ("17", ["n1", "n2"], 0, 0)


@pytest.mark.parametrize(
    ("outcome", "told", "over", "requeued"),
    [
        (Outcome.FINISHED, "", "0", False),
        (Outcome.PREEMPTED, "USR1", "wait", True),  # the time limit
        (Outcome.PREEMPTED, "", "wait", True),  # the grace time of a preemption: only the ranks were told
        (Outcome.DIVERGED, "", "65", False),
        (Outcome.BAD_CONFIGURATION, "", "78", False),
        (Outcome.NO_SPACE, "", "73", False),
        (Outcome.INFRASTRUCTURE, "", "", False),  # once more on the same nodes
        (Outcome.INFRASTRUCTURE, "TERM", "wait", True),
    ],
)
def test_what_follows_an_attempt(fakes, made, checkpoint, monkeypatch, outcome, told, over, requeued) -> None:
    monkeypatch.setattr("launch.retry.SOON", 0.0)
    job.begin(made[1], JOB)
    checkpoint["step"] = 10
    ended(made[1], 1, outcome, step=10)
    assert job.end(made[1], 1, told, 0, JOB) == {"over": over}
    assert ("scontrol requeue 17" in fakes.calls()) == requeued
    assert json.loads((made[1] / "logs/1/attempt.json").read_text())["asked"] is False


def test_a_run_that_makes_no_progress_is_not_requeued_for_ever(fakes, made, checkpoint) -> None:
    for number in range(1, 4):
        job.begin(made[1], JOB)
        ended(made[1], number, Outcome.PREEMPTED)
        assert job.end(made[1], number, "USR1", 0, JOB) == {"over": "wait"}
    job.begin(made[1], JOB)
    ended(made[1], 4, Outcome.PREEMPTED)
    assert job.end(made[1], 4, "USR1", 0, JOB) == {"over": "75"}
    assert job.begin(made[1], JOB) == {"over": "75"}  # also if Slurm starts it once more
    assert job.begin(made[1], JOB | {"SLURM_JOB_ID": "18"})["attempt"] == "5"  # a resume counts anew


def test_attempts_that_slurm_cut_off_are_judged_at_the_next_start(fakes, made, checkpoint) -> None:
    fakes.says("sinfo", "n1 down*\nn2 idle\nn3 idle\nn4 idle")
    for number in range(1, 5):
        assert job.begin(made[1], JOB)["attempt"] == str(number)
    assert job.begin(made[1], JOB) == {"over": "69"}
    record = json.loads((made[1] / "logs/1/attempt.json").read_text())
    assert (record["outcome"], record["nodes"]) == ("infrastructure", ["n1", "n2"])
    assert suspects.read(made[1].parent) == {"n1": "it is down*"}


def test_a_finished_run_whose_end_was_cut_off_is_only_finished_again(fakes, made, checkpoint) -> None:
    job.begin(made[1], JOB)
    ended(made[1], 1, Outcome.FINISHED)
    assert job.begin(made[1], JOB) == {"over": "0"}
    assert not (made[1] / "logs/2").exists()


def test_a_cancelled_job_is_neither_requeued_nor_started(fakes, made, checkpoint) -> None:
    job.begin(made[1], JOB)
    write_json(made[1] / job.CANCEL, {"job": "17"})
    ended(made[1], 1, Outcome.PREEMPTED)
    assert job.end(made[1], 1, "USR1", 0, JOB) == {"over": "75"}
    assert job.begin(made[1], JOB) == {"over": "75"}
    assert "scontrol requeue 17" not in fakes.calls()


def test_a_job_that_slurm_ends_or_has_started_elsewhere_is_not_requeued(fakes, made, checkpoint) -> None:
    cases = (
        ("COMPLETING", 0, "wait"),
        ("COMPLETING", 1, "wait"),
        ("PENDING", 0, "wait"),
        ("RUNNING", 1, "75"),
        ("PENDING", 1, "75"),
    )
    for number, (state, restarts, over) in enumerate(cases, 1):
        fakes.says("scontrol", f"JobId=17 JobState={state} Restarts={restarts}")
        job.begin(made[1], JOB | {"SLURM_JOB_ID": str(number)})
        ended(made[1], number, Outcome.PREEMPTED)
        assert job.end(made[1], number, "TERM", 143, JOB | {"SLURM_JOB_ID": str(number)}) == {"over": over}
    assert not any("requeue" in line for line in fakes.calls())


def test_a_requeued_job_is_kept_off_nodes_that_failed(fakes, made, checkpoint) -> None:
    job.begin(made[1], JOB)
    (made[1] / "logs/1/srun.log").write_text("srun: error: Task launch for StepId=17.0 failed on node n2: I/O error\n")
    assert job.end(made[1], 1, "", 1, JOB) == {"over": "wait"}
    assert fakes.calls()[-1] == "scontrol update JobId=17 ExcNodeList=n2"
    record = json.loads((made[1] / "logs/1/attempt.json").read_text())
    assert record["message"].startswith("no rank started; srun ended with 1: srun: error: Task launch")


def test_a_controller_that_is_away_is_asked_again_and_given_up(fakes, made, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(job, "REQUEUE_PAUSE", 0.0)
    fakes.answer("scontrol", "scontrol-down")
    job.begin(made[1], JOB)
    ended(made[1], 1, Outcome.PREEMPTED)
    assert job.end(made[1], 1, "USR1", 0, JOB) == {"over": "75"}
    assert len([line for line in fakes.calls() if line.startswith("scontrol")]) == job.REQUEUE_TRIES


def test_a_member_of_an_array_is_called_by_its_own_name() -> None:
    assert job.job_of({"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "2"}) == "20_2"
    assert job.job_of(JOB) == "17"
    assert query.members("17_[1-3,5%2]") == ["17_1", "17_2", "17_3", "17_5"]


def run_script(
    fakes: Fakes, made: tuple[configuration.RunConfig, Path], srun: str, **asked: Any
) -> subprocess.Popen[str]:
    """Start the real batch script with an srun that does what a test says: `$out` is the attempt's folder."""
    config, folder = made
    script = slurm.describe(config, folder, slurm.Options(nodes=2, **asked))
    slurm.environment.write(folder, {"PATH": str(fakes.folder)})
    outcome = shlex.quote(json.dumps({"outcome": "preempted", "exit_code": 75, "message": "so", "rank": 0, "time": 0}))
    fakes.script("srun", ["#!/bin/bash", f'out={folder}/logs/$attempt; outcome={outcome}', f'echo "srun $*" >>{fakes.calls_file}', srun])  # fmt: skip
    (folder / "slurm.sbatch").write_text(script)
    return subprocess.Popen(
        ["bash", str(folder / "slurm.sbatch")], env=JOB | {"PATH": str(fakes.folder)}, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_the_script_passes_the_warning_on_requeues_itself_and_waits_to_be_ended(fakes, made) -> None:
    srun = 'trap "echo $outcome >$out/outcome.json; exit 0" USR1; for i in {1..600}; do sleep 0.05; done'
    srun = srun.replace('"echo $outcome', '\'echo "$outcome"').replace('exit 0" USR1', "exit 0' USR1")
    process = run_script(fakes, made, srun)
    try:
        wait_until(lambda: any(line.startswith("srun") for line in fakes.calls()))
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "scontrol requeue 17" in fakes.calls())
        time.sleep(0.3)
        assert process.poll() is None  # it would count as the job's end
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
    assert json.loads((made[1] / "logs/1/attempt.json").read_text())["outcome"] == "preempted", said


def test_the_script_ends_with_the_outcome_and_starts_what_follows_a_finished_run(fakes, made) -> None:
    fakes.script("apptainer", ["#!/bin/bash", f'echo "apptainer $*" >>{fakes.calls_file}; exit 3'])
    srun = 'outcome=${outcome/preempted/finished}; echo "${outcome/75/0}" >$out/outcome.json'
    process = run_script(fakes, made, srun, container="/x.sif", container_runtime="apptainer")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 3, said  # of what follows, which needs no controller
    assert [line.split()[-1] for line in fakes.calls() if line.startswith("srun")] == ["--attempt=1"]
    assert fakes.calls()[-1].endswith(f"python3 -m trainer finish {made[1]}")
    assert "no further attempt: the run is finished" in said


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
