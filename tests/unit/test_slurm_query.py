"""How Slurm's answers are read: recorded ones of a real Slurm, and any others that look like them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import evidence
from launch.backends import slurm
from launch.slurm import options, query, rendezvous, suspects
from tests.unit.fakes.programs import RECORDED, Fakes
from trainer.outcome import Outcome, RunError


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def handles(*jobs: str, submitted: float = 0.0) -> list[tuple[Path, dict]]:
    return [(Path("runs/x"), {"job": job, "time": submitted}) for job in jobs]


def kinds(answers: list[tuple[str, str]]) -> list[str]:
    return [kind for kind, _ in answers]


def test_squeue_answers_first_for_many_jobs_in_one_call(fakes) -> None:
    fakes.answer("squeue", "squeue")
    fakes.answer("sacct", "sacct")
    answers = slurm.states(handles("1", "2", "3_0", "3_1", "4", "5", "9"))
    assert kinds(answers) == ["ended", "ended", "running", "pending", "pending", "ended", "pending"]
    assert answers[2] == ("running", "RUNNING, on n1")
    assert answers[4] == ("pending", "PENDING, waits: BeginTime")
    assert len(fakes.calls()) == 1


def test_sacct_answers_for_what_squeue_has_forgotten_and_scontrol_last(fakes) -> None:
    fakes.says("squeue", "4|PENDING|BeginTime|")
    fakes.answer("sacct", "sacct-down")
    fakes.answer("scontrol", "scontrol-unknown")
    answers = slurm.states(handles("4", "1", "3_0", "3_2", "9999"))
    assert kinds(answers) == ["pending", "ended", "ended", "ended", "vanished"]
    assert answers[2][1] == "CANCELLED, CANCELLED by 0, exit code 0:0 on n1"
    assert [line.split()[0] for line in fakes.calls()] == ["squeue", "sacct", "scontrol"]
    assert kinds(slurm.states(handles("9999", submitted=time.time()))) == ["pending"]


def test_a_job_that_the_controller_lost_has_vanished_whatever_accounting_says(fakes) -> None:
    fakes.says("squeue", "4|PENDING|BeginTime|")
    fakes.answer("sacct", "sacct")
    fakes.answer("scontrol", "scontrol-unknown")
    assert kinds(slurm.states(handles("3_0", "1"))) == ["vanished", "ended"]
    (fakes.folder / "squeue").unlink()
    assert kinds(slurm.states(handles("3_0", "1"))) == ["running", "ended"]


def test_scontrol_alone_is_enough(fakes) -> None:
    fakes.answer("scontrol", "scontrol-running")
    assert slurm.states(handles("3_0")) == [("running", "RUNNING, RUNNING, exit code 0:0")]


def test_a_dead_controller_leaves_states_unknown_but_for_what_is_over(fakes) -> None:
    fakes.answer("squeue", "squeue-down")
    fakes.answer("sacct", "sacct")  # from a database that lives: 3_0 RUNNING may be old
    fakes.answer("scontrol", "scontrol-down")
    answers = slurm.states(handles("1", "3_0"))
    assert kinds(answers) == ["ended", "unknown"]
    assert answers[1][1] == (
        "Slurm's controller does not answer: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    )


def test_without_any_command_the_state_is_unknown(fakes) -> None:
    assert slurm.states(handles("1")) == [("unknown", "there is none of squeue, sacct and scontrol")]


@pytest.mark.parametrize(
    ("word", "kind"),
    [("RUNNING", "running"), ("CANCELLED by 1000", "ended"), ("RUNNING+", "running"), ("NODE_FAIL", "ended"),
     ("REQUEUED", "pending"), ("COMPLETING", "running"), ("OUT_OF_MEMORY", "ended"), ("NEW_WORD", "unknown")],
)  # fmt: skip
def test_states_are_read_whatever_follows_them(word, kind) -> None:
    assert query.Job(query.state_of(word)).kind == kind


STATES = st.sampled_from(sorted(query.PENDING | query.RUNNING | query.ENDED))
WORDS = st.sampled_from(["", "None", "(null)", "n[1-3]", "BeginTime", "Nodes required for job are DOWN", "1:0", "é"])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 10**7), STATES, WORDS, WORDS), max_size=20), WORDS)
def test_tables_are_read_by_their_columns(rows, noise) -> None:
    text = "\n".join([noise, *(f"{number}|{state}|{reason}|{nodes}" for number, state, reason, nodes in rows)])
    found = query.read_squeue(text)
    assert {number: job.state for number, job in found.items()} == {str(number): state for number, state, _, _ in rows}
    assert query.read_sacct(text).keys() == found.keys()


@given(st.integers(0, 3000), st.integers(0, 59), st.integers(0, 23), st.integers(0, 40))
def test_time_limits_are_read_as_slurm_writes_them(mins, seconds, hours, days) -> None:
    assert options.minutes(f"{mins}") == mins
    assert options.minutes(f"{mins}:{seconds:02}") == mins + seconds / 60
    assert options.minutes(f"{hours}:{seconds:02}:30") == hours * 60 + seconds + 0.5
    assert options.minutes(f"{days}-{hours}") == days * 1440 + hours * 60
    assert options.minutes(f"{days}-{hours}:{seconds:02}") == days * 1440 + hours * 60 + seconds
    assert options.minutes(f"{days}-{hours}:{seconds:02}:30") == days * 1440 + hours * 60 + seconds + 0.5


PREFIX = st.sampled_from(["n", "gpu-", "a-b", "rack1x", "login"])
SPANS = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(st.lists(st.tuples(PREFIX, st.none() | SPANS), min_size=1, max_size=4))
def test_lists_of_nodes_expand_to_every_name_in_order(parts) -> None:
    text, names = [], []
    for prefix, spans in parts:
        if spans is None:
            text.append(prefix)
            names.append(prefix)
            continue
        inside = []
        for first, more, width in spans:
            last = first + more
            inside.append(f"{first:0{width}}-{last:0{width}}" if more else f"{first:0{width}}")
            names += [f"{prefix}{number:0{width}}" for number in range(first, last + 1)]
        text.append(f"{prefix}[{','.join(inside)}]")
    assert rendezvous.expand(",".join(text)) == names


@pytest.mark.parametrize("text", ["", "n[", "n[]", "n[1-]", "n]1", "n[a-b]", "n1,,n2"])
def test_what_is_no_list_of_nodes_is_refused(text) -> None:
    with pytest.raises(ValueError, match="is no list of nodes"):
        rendezvous.expand(text)


def test_ranks_meet_on_the_first_host_at_a_port_of_the_job(fakes) -> None:
    fakes.answer("scontrol", "hostnames")
    assert rendezvous.hosts("n[1-3],gpu-[08-10]") == ["n1", "n2", "n3", "gpu-08", "gpu-09", "gpu-10"]
    (fakes.folder / "scontrol").unlink()
    host, port = rendezvous.rendezvous("gpu-[08-10]", 17, 0)
    assert (host, port) == ("gpu-08", 20000 + 17 * 31)
    ports = {rendezvous.rendezvous("n1", job, start)[1] for job in range(100, 110) for start in range(8)}
    assert len(ports) == 80  # neither jobs beside each other nor starts after each other share one
    assert all(20000 <= rendezvous.rendezvous("n1", job, 7)[1] < 32000 for job in (1, 386, 387, 2**26))
    assert rendezvous.rendezvous("n1", 17, 0, lambda one: one != port) == ("n1", port + 1)
    last = 20000 + 11999
    assert rendezvous.rendezvous("n1", 387, 2, lambda one: one != last)[1] == 20000


def test_suspects_are_forgotten_after_a_day_and_torn_lines_are_passed_over(tmp_path) -> None:
    run = tmp_path / "runs/x"
    run.mkdir(parents=True)
    suspects.add(run, "17", {"n3": "it is down*", "n4": "no rank started on it"})
    with open(tmp_path / "runs" / suspects.FILE, "a") as file:
        file.write('{"time": 1, "node": "n1", "reason": "old"}\n{"time": "\n[]\n{"time": 1')
    assert suspects.read(tmp_path / "runs") == {"n3": "it is down*", "n4": "no rank started on it"}
    assert suspects.read(tmp_path / "runs", time.time() + suspects.FORGET_SECONDS) == {}
    assert suspects.read(tmp_path) == {}


@pytest.mark.parametrize(
    ("bad", "always", "nodes", "left"),
    [(["n3"], [], 2, ["n3"]), (["n3"], ["n1"], 1, ["n1", "n3"]), (["n3"], ["n1"], 2, ["n1"]), (["n1", "n2"], [], 2, [])],
)  # fmt: skip
def test_suspects_are_used_all_the_same_where_too_few_nodes_would_be_left(fakes, bad, always, nodes, left) -> None:
    fakes.answer("sinfo", "sinfo")
    assert suspects.left(bad, always, nodes, "low") == left


def test_a_drained_node_and_one_that_srun_blames_are_suspect(fakes, tmp_path) -> None:
    fakes.answer("sinfo", "sinfo-drain")
    (tmp_path / "srun.log").write_text(
        "srun: error: Task launch for StepId=12.0 failed on node n2: Communication connection failure\n"
    )
    found = suspects.seen(tmp_path, ["n1", "n2", "n3"], asked=False, seconds=5)
    assert found == {"n3": "it is drained", "n2": "srun could not start tasks on it: Communication connection failure"}


@pytest.mark.parametrize(("log", "rank", "host", "code"), [("killed", 3, "n3", -9), ("exit", 1, "n1", 69)])
def test_the_rank_that_srun_saw_fail_is_known(tmp_path, log, rank, host, code) -> None:
    (tmp_path / "srun.log").write_text((RECORDED / f"srun-{log}.txt").read_text())
    assert evidence.deaths(tmp_path) == [evidence.Death(rank, host, code, first=True)]
    (tmp_path / "srun.log").write_text("srun: error: n3: tasks 2-3: Terminated\n")
    assert evidence.deaths(tmp_path) == []


def test_a_command_that_does_not_end_is_a_silent_slurm(fakes) -> None:
    fakes.script("squeue", ["#!/bin/bash", "exec sleep 30"])
    with pytest.raises(query.Silent, match="no answer for 0.2 s") as error:
        query.call("squeue", seconds=0.2)
    assert error.value.outcome is Outcome.INFRASTRUCTURE
    with pytest.raises(RunError, match="there is no command sinfo"):
        query.call("sinfo")


def test_facts_of_a_job_are_read(tmp_path: Path) -> None:
    facts = query.read_scontrol((RECORDED / "scontrol-pending.out").read_text())
    assert (facts["JobState"], facts["Restarts"], facts["ExcNodeList"]) == ("PENDING", "1", "(null)")
    assert query.read_scontrol("") == {}
