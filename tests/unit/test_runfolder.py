"""The folder of a run comes into being whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ledger, standing
from trainer import config as configuration
from trainer import runfolder, setup
from trainer.config import RunConfig
from trainer.outcome import Outcome, RunError

ROOT = Path(__file__).parents[2]
KILLED = """
import os, pathlib, sys
from trainer import config, runfolder
place, name = {"folders": (pathlib.Path, "mkdir"), "record": (runfolder, "write_json"), "configuration": (runfolder, "write_config"),
               "rename": (pathlib.Path, "rename"), "filling": (os, "nothing")}[sys.argv[1]]
done = getattr(place, name, None)
fill = lambda partial: os._exit(9) if name == "nothing" else None
def die(*given, **options):
    if name != "rename":
        done(*given, **options)
    os._exit(9)
setattr(place, name, die)
runfolder.create(config.load(pathlib.Path(sys.argv[2]), sys.argv[3:]), [], {}, fill)
"""


def load(runs: Path, name: str = "r") -> RunConfig:
    return configuration.load(ROOT / "configs/quickstart.yaml", [f"--runs={runs}", f"--name={name}"])


@pytest.mark.parametrize("moment", ["folders", "record", "configuration", "filling", "rename"])
def test_a_kill_while_it_is_made_leaves_no_run_and_stands_in_nobodys_way(tmp_path, monkeypatch, moment) -> None:
    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    there = runfolder.create(load(tmp_path / "runs", "other"), [])
    line = [sys.executable, "-c", KILLED, moment, "configs/quickstart.yaml", f"--runs={tmp_path}/runs", "--name=r"]
    assert subprocess.run(line, cwd=ROOT, timeout=60).returncode == 9
    with pytest.raises(RunError, match="there is no run r") as caught:
        runfolder.open_run(tmp_path / "runs/r")
    assert str(caught.value).endswith("runs there: other")
    ledger.remember(there)
    assert [row["name"] for row in ledger.refreshed()] == ["other"]
    folder = runfolder.create(load(tmp_path / "runs"), [])
    assert standing.read(folder).state == "new"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "figures",
        "logs",
        "run.json",
    ]


def test_what_has_the_name_is_told_for_what_it_is(tmp_path) -> None:
    runfolder.create(load(tmp_path), [])
    with pytest.raises(RunError, match="there is a run r already"):
        runfolder.create(load(tmp_path), [])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    with pytest.raises(RunError, match="there is a folder notes already, and it is no run"):
        runfolder.create(load(tmp_path, "notes"), [])
    (tmp_path / "page").write_text("mine")
    with pytest.raises(RunError, match="there is a file page already, and it is no run"):
        runfolder.create(load(tmp_path, "page"), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "page", "r"], (
        "nothing of the refused ones is left"
    )
    assert (tmp_path / "notes/todo.txt").read_text() == (tmp_path / "page").read_text() == "mine"


def test_what_cannot_be_filled_or_looked_at_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(partial: Path) -> None:
        (partial / "checkpoints/step-1").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="cannot be written: No space left") as caught:
        runfolder.create(load(tmp_path), [], fill=full)
    assert caught.value.outcome is Outcome.NO_SPACE

    def asked(_partial: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runfolder.create(load(tmp_path), [], fill=asked)

    def hidden(_path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    config = load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", hidden)  # a folder above may not be searched
        with pytest.raises(RunError, match="the run folder cannot be made: Permission denied"):
            runfolder.create(config, [])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_removed_while_it_is_looked_at_stands_as_one_without_steps(tmp_path) -> None:
    folder = runfolder.create(load(tmp_path), [])
    (folder / "config.yaml").unlink()
    assert (standing.read(folder).state, standing.read(folder).steps) == ("new", None)


def test_a_tokenizer_is_in_a_run_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    (tmp_path / "table/tokenizer").mkdir(parents=True)
    (tmp_path / "table/tokenizer/tokenizer.json").write_text("{}")
    folder, copy = runfolder.create(load(tmp_path), []), shutil.copyfile

    def dies(source: Path, target: Path) -> None:
        target.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", dies)
    with pytest.raises(KeyboardInterrupt):
        setup.keep_tokenizer(tmp_path / "table", folder)
    assert not (folder / "tokenizer").exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    setup.keep_tokenizer(tmp_path / "table", folder)
    assert (folder / "tokenizer/tokenizer.json").read_text() == "{}"
    assert not (folder / "tokenizer.partial").exists()
    (tmp_path / "table/tokenizer/tokenizer.json").write_text("other")
    setup.keep_tokenizer(tmp_path / "table", folder)
    assert (folder / "tokenizer/tokenizer.json").read_text() == "{}", "a run keeps its own"
