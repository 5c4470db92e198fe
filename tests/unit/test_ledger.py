"""The ledger is a cache: quick, safe under concurrency, and restored from the run folders whatever happens to it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ledger, standing
from launch.verbs.listing import COLUMNS, List, age, plain
from trainer.outcome import Outcome, RunError, write_outcome

ROOT = Path(__file__).parents[2]


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def made(runs: Path, name: str, outcome: Outcome | None = Outcome.FINISHED) -> Path:
    folder = runs / name
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  length: 40 steps\n")
    (folder / "run.json").write_text(json.dumps({"created": 5.0}))
    if outcome is not None:
        ended(folder, 1, outcome)
    return folder


def ended(folder: Path, number: int, outcome: Outcome) -> None:
    logs = folder / f"logs/{number}"
    logs.mkdir()
    write_outcome(logs, outcome, "as told", step=3)
    told = json.loads((logs / "outcome.json").read_text())
    (logs / "attempt.json").write_text(json.dumps({**told, "attempt": number, "checkpoint": 3, "seconds": 2.0}))


def states() -> dict[str, str]:
    return {row["name"]: row["state"] for row in ledger.refreshed()}


def test_it_lies_in_the_users_state_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "b"))
    assert ledger.home() == tmp_path / "a"
    monkeypatch.delenv("ORTHOGON_STATE")
    assert ledger.home() == tmp_path / "b/orthogon"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert ledger.home() == Path.home() / ".local/state/orthogon"


def test_a_list_follows_the_folders_and_reads_again_only_what_has_changed(state, tmp_path, monkeypatch) -> None:
    first, second = made(tmp_path / "runs", "a"), made(tmp_path / "runs", "b", None)
    ledger.remember(first)
    ledger.remember(second)
    assert states() == {"a": "finished", "b": "new"}
    read, asked = standing.read_all, []
    monkeypatch.setattr(standing, "read_all", lambda folders: asked.append(len(folders)) or read(folders))
    assert states() == {"a": "finished", "b": "new"}
    assert sum(asked) == 0
    ended(second, 1, Outcome.DIVERGED)
    assert states() == {"a": "finished", "b": "diverged"}
    assert states() == {"a": "finished", "b": "diverged"}
    assert sum(asked) == 1
    ended(first, 2, Outcome.PREEMPTED)
    assert states()["a"] == "preempted"
    with ledger.opened() as connection:
        found = connection.execute(
            "select number, outcome, step from attempts where folder = ?", (str(first),)
        ).fetchall()
    assert found == [(1, "finished", 3), (2, "preempted", 3)]
    (first / "config.yaml").unlink()
    assert states()["a"] == "gone"


def test_rebuild_restores_all_from_the_run_folders(state, tmp_path) -> None:
    for runs in ("one", "two"):
        for name in ("a", "b"):
            ledger.remember(made(tmp_path / runs, f"{runs}-{name}"))
    before = ledger.refreshed()
    made(tmp_path / "three", "new")
    with ledger.opened() as connection:
        connection.execute("delete from runs where name = 'one-a'")
        connection.execute("update runs set state = 'running', loss = 1")
    assert ledger.rebuild(tmp_path / "three") == 5
    after = [row for row in ledger.refreshed() if row["name"] != "new"]
    key = lambda row: row["folder"]  # noqa: E731
    assert [{**row, "updated": 0} for row in sorted(after, key=key)] == [
        {**row, "updated": 0} for row in sorted(before, key=key)
    ]


@pytest.mark.parametrize("damage", ["garbage", "truncated", "inside", "newer", "other"])
def test_a_ledger_that_is_of_no_use_is_moved_aside_and_made_again(state, tmp_path, capsys, damage) -> None:
    for number in range(8):
        ledger.remember(made(tmp_path / "runs", f"r{number}"))
    file = state / ledger.FILE
    if damage == "garbage":
        file.write_bytes(b"no database at all" * 300)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "inside":
        data = bytearray(file.read_bytes())
        data[-4096:] = bytes(4096)
        file.write_bytes(data)
    else:
        connection = sqlite3.connect(file)
        connection.execute("pragma user_version = 99" if damage == "newer" else "alter table runs rename to things")
        connection.commit()
        connection.close()
    assert len(states()) == 8
    note = capsys.readouterr().err
    assert "the ledger was unusable" in note
    assert ("version 99" in note) == (damage == "newer")
    assert len([path for path in state.iterdir() if path.name.startswith(f"{ledger.FILE}.")]) == 1
    assert len(states()) == 8
    assert capsys.readouterr().err == ""


WRITE = """
import sys
from pathlib import Path
from launch import ledger
for name in sys.argv[2:]:
    ledger.remember(Path(sys.argv[1]) / name)
"""


def test_many_that_write_at_once_lose_nothing(state, tmp_path) -> None:
    names = [[f"r{writer}-{number}" for number in range(10)] for writer in range(4)]
    for name in (name for some in names for name in some):
        made(tmp_path / "runs", name)
    state.mkdir()
    (state / ledger.FILE).write_bytes(b"broken, too" * 500)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, f"{tmp_path}/runs", *some], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for some in names
    ]
    notes = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("was unusable" in note for note in notes) == 1, notes
    assert len(states()) == 40


def test_a_transaction_that_breaks_changes_nothing(state, tmp_path) -> None:
    ledger.remember(made(tmp_path / "runs", "a"))
    with pytest.raises(ZeroDivisionError), ledger.opened() as connection:
        print(connection.execute("delete from runs"), 1 / 0)
    assert states() == {"a": "finished"}


def test_a_ledger_that_cannot_be_written_is_told_and_stops_no_run(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "file" / "state"))
    ledger.remember(made(tmp_path / "runs", "a"))
    assert "the ledger cannot be written" in capsys.readouterr().err
    with pytest.raises(RunError) as error, ledger.opened():
        pass
    assert error.value.outcome.code == 69
    monkeypatch.setenv("ORTHOGON_STATE", "/dev/full/state")
    with pytest.raises(RunError), ledger.opened():
        pass


def test_a_full_disk_under_the_ledger(state, tmp_path, capsys, monkeypatch) -> None:
    folder = made(tmp_path / "runs", "a")
    ledger.remember(folder)
    connect = ledger._connect

    def full(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("pragma max_page_count = 1")
        return connection

    monkeypatch.setattr(ledger, "_connect", full)
    with pytest.raises(RunError, match="full") as error, ledger.opened() as connection:
        connection.execute(
            "insert into attempts select :f, 9, hex(zeroblob(90000)), '', 0, 0, 0, 0", {"f": str(folder)}
        )
    assert error.value.outcome.code == 73
    ended(folder, 2, Outcome.BUG)
    assert states() == {"a": "bug"}


def test_the_verb_prints_a_table_json_and_what_to_do_without_runs(state, tmp_path, capsys) -> None:
    assert List()([]) == 0
    assert "no runs are known" in capsys.readouterr().out
    made(tmp_path / "runs", "a")
    assert List(rebuild=True, runs=tmp_path / "runs")([]) == 0
    captured = capsys.readouterr()
    assert captured.err == "1 runs are read from their folders\n"
    head, row = captured.out.splitlines()
    assert head.split() == list(COLUMNS)
    assert row.split()[:4] == ["a", "finished", "0/40", "-"]
    assert List(json=True)([]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"
    cut = plain(ledger.refreshed(), 40).splitlines()
    assert "\x1b[32mfinished\x1b[0m" in cut[1]


def test_simple_command_lines_need_no_parser() -> None:
    assert List.quick([]) == List()
    assert List.quick(["--json", "--runs=x"]) == List(json=True, runs=Path("x"))
    assert List.quick(["--watch", "--rebuild", "--runs", "x"]) == List(watch=True, rebuild=True, runs=Path("x"))
    assert List.quick(["--help"]) is None
    assert List.quick(["--runs"]) is None


def test_a_list_loads_neither_parser_nor_pydantic_nor_rich(state) -> None:
    code = (
        "import sys; sys.argv = ['orthogon', 'list']\ntry:\n from launch.cli import main; main()\nexcept SystemExit: pass\n"
        "print([m for m in ('tyro', 'pydantic', 'rich', 'yaml', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (180000, "2 d")]
)
def test_ages_are_short(seconds, text) -> None:
    assert age(seconds) == text
