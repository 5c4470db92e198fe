"""Synthetic text of tiny members: the same table on any number of ranks and after a kill; a student of it, end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch import distilling
from tests.dist import bodies_run, bodies_tools
from tests.dist.test_cli import ROOT, finished
from trainer import config as configuration
from trainer import runfolder
from trainer.data import open_data, open_table
from trainer.ensemble import manifest, recipe
from trainer.files import sha256_file
from trainer.outcome import RunError

MEMBERS = ["tiny", "voice-1"]
BATCH, SEQUENCES = 8, 60  # the last batch is not full


@pytest.fixture(scope="module")
def runs(group, tiny) -> Path:
    """The tiny run, another one of other seeds, and their ensemble `voices`."""
    seeds = ["--name=voice-1", "--seed=1", "--data.order_seed=1", "--evaluate.prompts=[]"]
    assert group(2, bodies_run.train, tiny.yaml, seeds)[0]["outcome"] == "finished"
    runs = tiny.place / "runs"
    manifest.write(runs, manifest.make("voices", runs, MEMBERS, "logit mean"))
    return runs


def made_of(runs: Path, mode: str, sequences: int = SEQUENCES, **changes) -> recipe.Recipe:
    teacher = recipe.teacher_of(runs, changes.pop("teacher", "voices"))
    return replace(recipe.recipe(runs, teacher, mode, tokens=16 * sequences, batch=BATCH, seed=3), **changes)


def sampled(group, world: int, folder: Path, runs: Path, made: recipe.Recipe, part_tokens: int = 2 * BATCH * 16) -> list[dict]:
    recipe.begin(folder, made)
    return group(world, bodies_tools.sample_text, str(folder), str(runs), [], part_tokens)


def tokens(folder: Path, config) -> np.ndarray:
    split = open_table(folder, config).train
    return split.rows(np.arange(split.sequences))[0]


@pytest.fixture(scope="module")
def pool(group, runs, tmp_path_factory) -> Path:
    """Of two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("synthetic") / "pool"
    found = sampled(group, 2, folder, runs, made_of(runs, "pool"))
    assert [answer["decoded"] for answer in found] == [4, 4]  # batches of each rank
    assert found[0]["tokens"] == 16 * SEQUENCES
    return folder


def test_1_2_3_ranks_make_the_same_table_in_parts_of_any_size(group, runs, pool, tmp_path) -> None:
    for world, part_tokens in ((1, 1), (3, BATCH * 16), (2, 1 << 17)):
        folder = tmp_path / f"{world}"
        found = sampled(group, world, folder, runs, made_of(runs, "pool"), part_tokens)
        assert "error" not in found[0], found
        assert sha256_file(folder / "train.arrow") == sha256_file(pool / "train.arrow")
        mine, theirs = (json.loads((one / "table.json").read_text()) for one in (folder, pool))
        assert mine["synthetic"] == theirs["synthetic"]
        assert {path.name for path in folder.iterdir()} == {"table.json", "train.arrow", "tokenizer"}


def test_a_pool_takes_batches_of_members_in_turn_and_joint_copies_are_one(group, runs, pool, tmp_path, tiny) -> None:
    config = runfolder.open_run(runs / "tiny").data
    pooled = tokens(pool, config)
    for turn, name in enumerate(MEMBERS):
        single = tmp_path / name
        sampled(group, 1, single, runs, made_of(runs, name))
        rows = np.arange(SEQUENCES) // BATCH % 2 == turn
        assert np.array_equal(tokens(single, config)[rows], pooled[rows])
        assert not np.array_equal(tokens(single, config)[~rows], pooled[~rows])
    first = manifest.read(runs, "voices").members[0]
    copies = tmp_path / "copies"
    sampled(group, 1, copies, runs, made_of(runs, "joint", members=(first,) * 3))
    assert np.array_equal(tokens(copies, config), tokens(tmp_path / "tiny", config))
    joint = tmp_path / "joint"
    found = sampled(group, 2, joint, runs, made_of(runs, "joint"))[0]
    assert not np.array_equal(tokens(joint, config), tokens(tmp_path / "tiny", config))
    assert abs(found["teacher_loss"] - found["teacher_entropy"]) < 5 * found["teacher_loss_error"]


KILLED = """
import sys, time
from pathlib import Path
from trainer.ensemble import parts, sample
parts.PART_TOKENS = 1
decode = sample.decode
sample.decode = lambda *a, **k: (time.sleep(0.3), decode(*a, **k))[1]
sample.sample(Path(sys.argv[1]), Path(sys.argv[2]), [])
"""


def test_a_killed_sampling_goes_on_with_the_parts_that_are_right(group, runs, pool, tmp_path) -> None:
    folder = tmp_path / "killed"
    recipe.begin(folder, made_of(runs, "pool"))
    work = recipe.partial(folder)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(runs)], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    until = time.monotonic() + 90
    while len(list(work.glob("part-*.json"))) < 3:
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    whole = sorted(work.glob("part-*.json"))
    assert 3 <= len(whole) < 8
    assert not folder.exists()
    harmed = whole[1].with_suffix(".npy")
    content = bytearray(harmed.read_bytes())
    content[-3] ^= 1  # a bit of the disk
    harmed.write_bytes(content)
    decoded = [answer["decoded"] for answer in sampled(group, 2, folder, runs, made_of(runs, "pool"), 1)]
    assert sum(decoded) == 8 - len(whole) + 1
    assert sha256_file(folder / "train.arrow") == sha256_file(pool / "train.arrow")


def test_who_comes_while_a_table_is_made_waits_for_it(group, runs, pool, tmp_path) -> None:
    folder, made = tmp_path / "slow", made_of(runs, "pool")
    recipe.begin(folder, made)
    slow = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(runs)], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    until = time.monotonic() + 90
    while not list(recipe.partial(folder).glob("part-*.json")):
        assert slow.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    found = group(2, bodies_tools.sample_text, str(folder), str(runs), [], 1)  # no `begin`, which would wait here
    assert slow.wait(timeout=60) == 0
    assert [answer["decoded"] for answer in found] == [0, 0]
    assert found[0]["teacher_loss"] == recipe.statistics(folder)["teacher_loss"]
    assert sha256_file(folder / "train.arrow") == sha256_file(pool / "train.arrow")
    assert not recipe.partial(folder).exists()
    assert not recipe.begin(folder, made)


def test_what_is_there_is_not_made_again_and_nothing_is_written_over(runs, pool, tmp_path) -> None:
    made = made_of(runs, "pool")
    assert recipe.finished(pool, made)
    with pytest.raises(RunError, match="other settings: seed 3, now 4"):
        recipe.finished(pool, replace(made, seed=4))
    recipe.begin(tmp_path / "a", made)
    with pytest.raises(RunError, match="other settings: mode pool, now joint"):
        recipe.begin(tmp_path / "a", replace(made, mode="joint"))
    (tmp_path / "b").mkdir()
    with pytest.raises(RunError, match="is no token table"):
        recipe.finished(tmp_path / "b", made)
    with pytest.raises(RunError, match="nobody is no member of voices"):
        made_of(runs, "nobody")
    with pytest.raises(RunError, match="--temperature is -1"):
        recipe.recipe(runs, recipe.teacher_of(runs, "voices"), "pool", tokens=9, batch=1, seed=0, temperature=-1)


def test_members_that_are_missing_or_others_are_refused_by_all_ranks(group, runs, tmp_path) -> None:
    made = made_of(runs, "pool")
    other = replace(made.members[1], manifest_sha256="0" * 64)
    for answer in sampled(group, 2, tmp_path / "other", runs, replace(made, members=(made.members[0], other))):
        assert "another step-00000020 than the ensemble was made of" in answer["error"]
    moved = (runs / "voice-1").rename(runs / "elsewhere")
    try:
        for answer in sampled(group, 2, tmp_path / "missing", runs, made):
            assert "member voice-1 is missing" in answer["error"]
    finally:
        moved.rename(runs / "voice-1")
    file = next((runs / "voice-1/checkpoints/step-00000020").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        for answer in sampled(group, 2, tmp_path / "corrupt", runs, made):
            assert "member voice-1 is corrupt" in answer["error"]
    finally:
        file.write_bytes(content)


def test_students_take_the_teachers_text_and_tokenizer(runs, tiny, tmp_path) -> None:
    teacher = recipe.teacher_of(runs, "voices")
    distilling.check_teacher(configuration.load(Path(tiny.yaml)), teacher, runs)
    for change, what in (
        ("--data.validation_fraction=0.1", "data.validation_fraction is 0.2 for the teacher voices and 0.1"),
        ("--data.subset_tokens=160", "data.subset_tokens is None for the teacher"),
        ("--data.sequence_length=32", "data.sequence_length is 16 for the teacher"),
    ):
        with pytest.raises(RunError, match=what):
            distilling.check_teacher(configuration.load(Path(tiny.yaml), [change]), teacher, runs)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RunError, match="tokenizer.path, by its digest"):
        distilling.check_teacher(
            configuration.load(Path(tiny.yaml), [f"--data.tokenizer.path={tmp_path}"]), teacher, runs
        )


def test_a_student_is_trained_by_one_command_and_validated_on_real_text(tiny, runs, group) -> None:
    words = ("distill", "text", tiny.yaml, "--teacher=voices", "--share=3/4", "--tokens=1k", "--mode=joint", "--batch=8", "--name=reader")  # fmt: skip
    rest = ("--train.length=1 epochs", "--evaluate.prompts=[]", "--finish.export=false", "--resources.ranks=1")
    code, text = finished(*words, *rest)
    assert code == 0, text
    assert "reader: finished (1 of 1)" in text
    code, again = finished(*words, *rest)
    assert code == 0, again
    assert "is there already, with these settings" in again
    assert "reader: done before" in again
    config = runfolder.open_run(runs / "reader")
    events = runfolder.events(runs / "reader")
    tables = next(event["tables"] for event in events if event["event"] == "data")
    teachers = next(event["tables"] for event in runfolder.events(runs / "tiny") if event["event"] == "data")["data"]
    opened = open_data({name: Path(one["table"]) for name, one in tables.items()}, config.data)
    real = opened.tables["real"].facts
    assert real["splits"] == json.loads((Path(teachers["table"]) / "table.json").read_text())["splits"]
    assert (list(opened.validation), opened.measured, opened.synthetic) == (["real"], {"real": 1}, ["synthetic"])
    assert opened.unigram_bits_per_byte == real["unigram_bits_per_byte"]
    history = [json.loads(line) for line in (runs / "reader/metrics.jsonl").read_text().splitlines()]
    last = [record for record in history if "loss" in record][-1]
    sequences = real["splits"]["train"]["sequences"]
    assert last["epochs"]["real"] == 1
    assert last["epochs"]["synthetic"] == pytest.approx(3 * sequences / 63, abs=3 / 63)
    assert f"synthetic pool passes: {last['epochs']['synthetic']:.2f}" in (runs / "reader/logs/launcher.log").read_text()
    assert any(event["event"] == "synthetic pool repeated" for event in events)
    validation = [record for record in history if "validation_loss" in record][-1]
    assert validation["validation_tokens"] == real["splits"]["validation"]["tokens"]
    assert "validation_sources" not in validation
    plain = group(1, bodies_tools.evaluate, str(runs / "reader"), [], [])[0]["validation"]
    assert plain["loss"] == pytest.approx(validation["validation_loss"], abs=1e-6)
    control = distilling.without_real_text(config, 1024)
    opened = open_data({name: Path(one["table"]) for name, one in tables.items()}, control.data)
    assert (opened.train.names, list(opened.validation), opened.measured) == (["synthetic"], ["real"], {"real": 1})
    alone = replace(config.data, mixture={"synthetic": replace(config.data.mixture["synthetic"], weight=1.0)})
    with pytest.raises(RunError, match="no source has validation text"):
        open_data({"synthetic": Path(tables["synthetic"]["table"])}, alone)
