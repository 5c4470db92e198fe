"""Graphs of runs: what may start next, digests, and a driver that skips, resumes, stops and bounds, on stand-ins."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from launch import cli, pipeline
from launch.backends import torchrun
from launch.graph import Node, read, ready, stopped
from launch.pipeline import Driver, drive, queue
from trainer.outcome import Outcome, RunError, write_outcome

ROOT = Path(__file__).parents[2]
NODES = {
    "a": Node(name="a"), "b": Node(name="b"), "c": Node(name="c", after=("a", "b")), "d": Node(name="d", after=("c",)),
    "e": Node(name="e", after=("a",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("done", "failed", "running", "limit", "expected"),
    [
        ("", "", "", 9, "ab"), ("", "", "", 1, "a"), ("", "", "a", 2, "b"), ("", "", "a", 1, ""), ("a", "", "", 9, "be"),
        ("ab", "", "", 9, "ce"), ("ab", "", "", 1, "c"), ("a", "b", "", 9, "e"), ("abce", "", "", 9, "d"), ("abcde", "", "", 9, ""),
        ("", "a", "b", 9, ""), ("", "", "abc", 2, ""),
    ],
)  # fmt: skip
def test_ready_are_nodes_whose_predecessors_are_done_within_the_limit(done, failed, running, limit, expected) -> None:
    assert ready(NODES, set(done), set(failed), set(running), limit) == list(expected)


def test_stopped_are_all_that_come_after_a_failure_with_its_name() -> None:
    assert stopped(NODES, {"b"}) == {"c": "b", "d": "b"}
    assert stopped(NODES, {"a"}) == {"c": "a", "d": "a", "e": "a"}
    assert stopped(NODES, set()) == {}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Two members, a run after them, and a command after that."""
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.01)
    (tmp_path / "run.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    (tmp_path / "notes.txt").write_text("one")
    command = json.dumps([sys.executable, "-c", "print('compared')"])
    (tmp_path / "g.yaml").write_text(
        f"runs: {tmp_path}/runs\n"
        "nodes:\n"
        f"  compare: {{command: {command}, after: [s], inputs: [notes.txt]}}\n"
        "  s: {config: run.yaml, after: [m0, m1]}\n"
        "  m0: {config: run.yaml, set: {seed: 0}}\n"
        '  m1: {config: run.yaml, set: {seed: 1, train: {length: "30 steps"}}}\n'
    )
    return tmp_path


@pytest.fixture
def backend(monkeypatch) -> dict:
    """torchrun with runs that end after two questions: as `fate` says, else finished."""
    facts: dict = {"started": [], "most": 0, "fate": {}, "age": {}, "resumed": []}

    def submit(config, folder, options, *, resume, after=()):
        facts["started"].append(folder.name)
        facts["resumed"] += [folder.name] if resume else []
        facts["age"][folder.name] = 0
        facts["most"] = max(facts["most"], sum(age < 3 for age in facts["age"].values()))
        return {"pid": 1, "started": 1, "host": "h"}

    def state(folder, handle):
        facts["age"][folder.name] = age = facts["age"].get(folder.name, 0) + 1
        if age < 3:
            return "running", ""
        outcome = facts["fate"].get(folder.name, Outcome.FINISHED)
        logs = folder / f"logs/{handle['attempts'] + 1}"
        if not logs.exists():
            logs.mkdir()
            write_outcome(logs, outcome, f"{folder.name} ended", asked=True)
        return "ended", ""

    monkeypatch.setattr(torchrun, "submit", submit)
    monkeypatch.setattr(torchrun, "state", state)
    return facts


def driven(place: Path, limit: int = 2) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = drive(Driver(read(place / "g.yaml"), "torchrun", torchrun.Options(), say=lines.append), limit)
    return code, lines


def test_a_graph_runs_in_order_and_a_second_time_does_nothing(place, backend) -> None:
    assert list(read(place / "g.yaml").nodes) == ["m0", "m1", "s", "compare"]
    code, lines = driven(place)
    assert code == 0, lines
    assert backend["started"] == ["m0", "m1", "s"]
    assert backend["most"] == 2
    assert lines[-1] == "compare: finished (4 of 4)"
    assert (place / "runs/pipelines/g/compare.log").read_text() == "compared\n"
    assert json.loads((place / "runs/m1/run.json").read_text())["lineage"]["pipeline"] == "g"
    code, lines = driven(place)
    assert (code, lines) == (0, [f"{name}: done before" for name in ("m0", "m1", "s", "compare")])
    (place / "notes.txt").write_text("two")
    code, lines = driven(place)
    assert lines == [*(f"{n}: done before" for n in ("m0", "m1", "s")), lines[3], "compare: finished (4 of 4)"]
    assert backend["started"] == ["m0", "m1", "s"]


def test_one_at_a_time_where_one_is_asked_for(place, backend) -> None:
    assert driven(place, 1)[0] == 0
    assert backend["most"] == 1


def test_a_failure_stops_what_comes_after_it_and_nothing_else_and_is_resumed_later(place, backend) -> None:
    backend["fate"]["m0"] = Outcome.DIVERGED
    code, lines = driven(place)
    assert code == 65
    assert "m0: failed: diverged: m0 ended" in lines
    assert "m1: finished (1 of 4)" in lines
    assert lines[-2:] == ["s: not started, because m0 failed", "compare: not started, because m0 failed"]
    del backend["fate"]["m0"]
    code, lines = driven(place)
    assert code == 0, lines
    assert "m0: resumed on torchrun" in lines
    assert backend["resumed"] == ["m0"]


def test_runs_that_go_on_are_found_again_by_the_next_driver(place, backend, monkeypatch) -> None:
    look = pipeline.look

    def broken(driver: Driver, node: Node) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "look", broken)
    with pytest.raises(KeyboardInterrupt):
        driven(place)
    monkeypatch.setattr(pipeline, "look", look)
    backend["age"] = {}
    code, lines = driven(place)
    assert code == 0
    assert lines[:2] == ["m0: goes on already", "m1: goes on already"]
    assert backend["started"] == ["m0", "m1", "s"]


def test_a_run_that_was_made_of_something_else_is_never_touched(place, backend) -> None:
    assert driven(place)[0] == 0
    text = (place / "g.yaml").read_text()
    (place / "g.yaml").write_text(text.replace("seed: 1", "seed: 2"))
    code, lines = driven(place)
    assert code == 78
    assert any(line.startswith("m1: failed: there is a run m1 already, made from other inputs") for line in lines)
    (place / "g.yaml").write_text(text.replace("seed: 1", "resources: {ranks: 1}, seed: 1"))
    assert driven(place)[0] == 0, "how fast it is computed changes no digest"


def test_a_command_that_fails_is_told_with_its_last_line(place, backend) -> None:
    text = (place / "g.yaml").read_text()
    (place / "g.yaml").write_text(text.replace("print('compared')", "import sys; print('no good'); sys.exit(3)"))
    code, lines = driven(place)
    assert (code, lines[-1]) == (3, "compare: failed: the command ended with exit code 3: no good")
    (place / "g.yaml").write_text(text.replace(json.dumps(sys.executable), '"no-such-program"'))
    code, lines = driven(place)
    assert (code, lines[-1]) == (78, "compare: failed: no-such-program cannot be started: No such file or directory")


def test_an_end_that_cannot_be_put_on_record_is_a_failure(place, backend, monkeypatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "write_json", full)
    code, lines = driven(place)
    assert (code, lines[-1]) == (73, "compare: failed: its end cannot be put on record: No space left on device")


def test_two_drivers_of_one_graph_are_one_too_many(place, backend) -> None:
    driver = Driver(read(place / "g.yaml"), "torchrun", torchrun.Options())
    with pipeline.alone(driver), pytest.raises(RunError, match="another process drives pipeline g"):
        drive(driver, 1)


def test_a_queue_gets_all_runs_with_what_each_waits_for(place, backend, monkeypatch) -> None:
    given: list[tuple[str, list[str]]] = []
    submit = torchrun.submit
    monkeypatch.setattr(
        torchrun,
        "submit",
        lambda c, f, o, *, resume, after: given.append((f.name, after)) or submit(c, f, o, resume=resume),
    )
    graph = read(place / "g.yaml")
    with pytest.raises(RunError, match="node compare is a command"):
        queue(Driver(graph, "torchrun", torchrun.Options()))
    text = (place / "g.yaml").read_text().splitlines(keepends=True)
    (place / "g.yaml").write_text("".join(line for line in text if "compare" not in line))
    lines: list[str] = []
    assert queue(Driver(read(place / "g.yaml"), "torchrun", torchrun.Options(), say=lines.append)) == 0
    assert given == [("m0", []), ("m1", []), ("s", ["m0", "m1"])]
    assert lines[-1] == "s: started on torchrun, after m0, m1"


WRONG = [
    ("nodes: {}", "the graph has no nodes"),
    ("node: {}", "unknown key node"),
    ("nodes: {a: {config: run.yaml, command: [x]}}", "node a needs a config or a command"),
    ("nodes: {a: {config: run.yaml, afer: [b]}}", "node a: unknown key afer"),
    ("nodes: {a: {config: run.yaml, after: b}}", "node a: after is no list"),
    (
        "nodes: {member: {command: [x]}, b: {command: [x], after: [membre]}}",
        "node b comes after membre, which is no node",
    ),
    ("nodes: {a: {command: [x], after: [b]}, b: {command: [x], after: [a]}}", "nodes wait for each other: a, b"),
    ("nodes: {a: {command: [x], inputs: [none.txt]}}", "node a: input"),
    ("nodes: {../a: {command: [x]}}", "'../a' is no name of a node"),
    ("nodes: {a b: {config: run.yaml}}", "name"),
    ("nodes: {a: {config: run.yaml, set: {sed: 1}}}", "unknown key sed"),
    ("nodes: {a: {config: nowhere.yaml}}", "there is no file"),
    ("nodes: {a: {command: []}}", "node a: command is empty"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_graph_that_is_wrong_is_refused_before_anything_starts(place, text, words) -> None:
    (place / "w.yaml").write_text(text + "\n")
    with pytest.raises(RunError) as error:
        read(place / "w.yaml")
    assert words in str(error.value)
    assert error.value.outcome.code == 78


def test_the_verb_shows_the_order_and_refuses_what_it_does_not_know(place, capsys) -> None:
    assert cli.dispatch(["pipeline", str(place / "g.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == f"s: run {place}/runs/s, after m0, m1"
    assert not (place / "runs").exists()
    with pytest.raises(RunError, match="--at-once is below one"):
        cli.dispatch(["pipeline", str(place / "g.yaml"), "--at-once", "0"])
    with pytest.raises(RunError, match="is not understood"):
        cli.dispatch(["pipeline", str(place / "g.yaml"), "--optim.lr=1"])
