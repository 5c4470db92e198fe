"""Cluster files, the batch script as text, the environment of jobs and of ranks."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace

import pytest

from launch.backends import slurm
from launch.choices import choose
from launch.process import ROOT
from launch.slurm import environment, script
from tests.unit.fakes.programs import RECORDED
from trainer import config as configuration
from trainer import environment as ranks
from trainer.outcome import Outcome, RunError

FILES = sorted((ROOT / "configs/clusters").glob("*.yaml"))


def config(*overrides: str) -> configuration.RunConfig:
    return configuration.load(ROOT / "configs/quickstart.yaml", ["--runs=/home/user/runs", *overrides])


def described(options, monkeypatch, tmp_path, *overrides: str, folders: int = 1, **more) -> str:
    monkeypatch.chdir(tmp_path)
    one = config(*overrides)
    paths = [one.folder] if folders == 1 else [one.folder.with_name(f"member-{i}") for i in range(folders)]
    text = script.text(one, paths, options, **more)
    text = text.replace(str(tmp_path), "/home/user").replace(environment.python(), "/opt/venv/bin/python")
    return text.replace(str(ROOT), "/opt/orthogon")


VARIANTS = {
    "example": {}, "container": {}, "local-test": {}, "torchrun": {"start": "torchrun"},
    "apptainer": {"container": "/images/orthogon.sif", "container_runtime": "apptainer"},
    "array": {"array_limit": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_the_script_is_as_it_was_reviewed(monkeypatch, tmp_path, name) -> None:
    """After a change that is meant: ORTHOGON_WRITE=1 writes the files anew."""
    _, options, _ = choose(None, name if name in [f.stem for f in FILES] else "local-test", [])
    more = {"folders": 3, "after": ["12", "13"], "exclude": ["n3"]} if name == "array" else {}
    text = described(replace(options, **VARIANTS[name]), monkeypatch, tmp_path, **more)
    path = RECORDED / f"{name}.sbatch"
    if os.environ.get("ORTHOGON_WRITE"):
        path.write_text(text)
    assert text == path.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_what_was_measured_about_slurm_stands_in_every_script(monkeypatch, tmp_path) -> None:
    for name in VARIANTS:
        text = (RECORDED / f"{name}.sbatch").read_text()
        assert "#SBATCH --kill-on-invalid-dep=yes" in text
        assert "#SBATCH --open-mode=append" in text
        assert "#SBATCH --requeue" in text
        assert "#SBATCH --export=NONE" in text
        assert not re.search(r"trap .*\bCONT\b|--nodelist|#SBATCH -w|MASTER_ADDR=localhost|set -e", text)
        seconds = int(re.search(r"--signal=B:USR1@(\d+)", text)[1])  # type: ignore[index]
        assert seconds >= config().guard.stop_timeout + 60
    options = slurm.Options(time="5")
    with pytest.raises(RunError, match="leaves no time to train") as error:
        described(options, monkeypatch, tmp_path, "--guard.stop_timeout=240 s")
    assert error.value.mend == "ask for 15 minutes or more"


def test_paths_with_blanks_and_percents_reach_slurm_as_they_are(tmp_path) -> None:
    folder = tmp_path / "a b%j"
    text = script.text(config(), [folder], slurm.Options())
    assert f"--output='{tmp_path}/a b%%j/logs/slurm-%j.out'" in text
    assert f"folder='{folder}'" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cluster_file_loads(path) -> None:
    backend, options, rest = choose(None, str(path), ["--seed=3"])
    assert (backend, rest) == ("slurm", ["--seed=3"])
    assert options.nodes >= 1
    assert choose("slurm", path.stem, [])[1] == options


def test_an_unquoted_time_is_a_time(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("time: 24:00:00\nmem: '0'\n")
    assert choose("slurm", str(path), [])[1].time == "24:00:00"
    path.write_text("time: 90\n")
    assert choose("slurm", str(path), ["--nodes=3"])[1] == slurm.Options(time="90", nodes=3)


def test_options_of_before_hold_unless_a_file_is_given_or_the_backend_is_another(tmp_path) -> None:
    before = {"backend": "slurm", "options": vars(slurm.Options(partition="low", exclude=("n1",))), "job": "3"}
    assert choose("slurm", None, ["--nodes=2"], before)[1] == slurm.Options(partition="low", exclude=("n1",), nodes=2)
    assert choose("torchrun", None, [], before)[1] == choose("torchrun", None, [])[1]
    assert choose("slurm", "local-test", [], before)[1] == choose("slurm", "local-test", [])[1]


def test_a_cluster_file_that_does_not_fit_the_command_line_is_told(tmp_path) -> None:
    with pytest.raises(RunError, match="the cluster file is for slurm, and not for torchrun"):
        choose("torchrun", "example", [])
    (tmp_path / "c.yaml").write_text("partition: low\n")
    with pytest.raises(RunError, match="torchrun has no option 'partition'") as error:
        choose(None, str(tmp_path / "c.yaml"), [])
    assert "`backend: slurm`" in error.value.mend


@pytest.mark.parametrize(
    ("text", "what", "mend"),
    [
        ("partiton: gpu", "slurm has no option 'partiton'", "did you mean partition?"),
        ("nodes: two", "nodes: input should be a valid integer", "correct nodes"),
        ("nodes: 0", "nodes: input should be greater than 0", "correct nodes"),
        ("start: mpirun", "start: input should be 'srun' or 'torchrun'", "correct start"),
        ("time: tomorrow", "time: string should match pattern", "correct time"),
        ("partition: 'gpu; rm -rf /'", "partition: string should match", "correct partition"),
        ('sbatch: ["--x\\n#SBATCH --y"]', "sbatch.0: string should match", "correct sbatch.0"),
        ("backend: slrum", "there is no backend 'slrum'", "did you mean slurm?"),
    ],
)
def test_a_mistake_names_line_and_nearest(tmp_path, text, what, mend) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"account: a\n{text}\n" + ("" if "backend" in text else "backend: slurm\n"))
    with pytest.raises(RunError) as error:
        choose(None, str(path), [])
    assert error.value.what.startswith(what)
    assert error.value.mend == mend
    assert "c.yaml:2" in error.value.where


def test_an_unknown_cluster_names_the_nearest() -> None:
    with pytest.raises(RunError, match="there is no cluster 'exmaple'") as error:
        choose("slurm", "exmaple", [])
    assert error.value.mend == "did you mean example?"


def test_a_job_gets_what_it_needs_in_a_file_of_its_owner(tmp_path) -> None:
    here = {
        "PATH": "/bin", "HF_TOKEN": "it's secret", "SSH_AUTH_SOCK": "/s", "SLURM_JOB_ID": "3", "CUDA_VISIBLE_DEVICES": "1",
        "NCCL_DEBUG": "INFO", "SCRATCH": "/scratch", "TMPDIR": "/tmp/3", "AWS_SECRET": "x", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    path = environment.write(tmp_path, here, ["SCRATCH"])
    assert path.stat().st_mode & 0o777 == 0o600
    answer = subprocess.run(
        ["env", "-i", "/bin/bash", "-c", f'. "{path}"; /usr/bin/env'], capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in answer.stdout.splitlines())
    assert {"HF_TOKEN": "it's secret", "NCCL_DEBUG": "INFO", "SCRATCH": "/scratch"}.items() <= found.items()
    assert found["PYTHONPATH"] == str(ROOT)
    assert not {"SSH_AUTH_SOCK", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "TMPDIR", "AWS_SECRET"} & found.keys()
    kept = environment.recorded({"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "3", "ORTHOGON_TOKEN": "x", "HF_TOKEN": "x"})
    assert kept == {"NCCL_DEBUG": "INFO", "ORTHOGON_TOKEN": "***", "SLURM_JOB_ID": "3"}


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
}
MEET = {"MASTER_ADDR": "n1", "MASTER_PORT": "20017"}


@pytest.mark.parametrize(
    ("given", "starter", "rank"),
    [
        ({}, "", None),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", **STEP}, "torchrun", ("1", None, "2")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "other", ("1", None, "2")),
        (
            {"ORTHOGON_FORKED": "1", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", **STEP},
            "fork",
            ("0", "0", None),
        ),
        ({**STEP, **MEET}, "srun", ("5", "1", "8")),
        ({**STEP, **MEET, "CUDA_VISIBLE_DEVICES": "3"}, "srun", ("5", "0", "8")),
        ({**STEP, **MEET, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "srun", ("5", "1", "8")),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}, "", None),  # the batch script itself
        ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, "", None),  # a shell of salloc
        ({**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "", None),
    ],
)
def test_a_rank_knows_itself_by_whoever_started_it(given, starter, rank) -> None:
    found = dict(given)
    assert ranks.adopt(found) == starter
    assert (tuple(found.get(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")) if rank else None) == rank
    assert rank or "WORLD_SIZE" not in found


def test_tasks_that_do_not_know_where_they_meet_end_with_a_sentence() -> None:
    with pytest.raises(RunError, match="8 tasks that do not know where they meet") as error:
        ranks.adopt(dict(STEP))
    assert error.value.outcome is Outcome.BAD_CONFIGURATION
