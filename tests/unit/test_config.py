"""A typo costs a blink: file, line, key, nearest name; human sizes; what a resume may change."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer import config as configuration
from trainer import reference
from trainer.outcome import Outcome, RunError
from trainer.units import parse_count, parse_seconds, split_interval, split_length
from trainer.yaml_source import Source

ROOT = Path(__file__).parents[2]
MINIMAL = """\
name: t
model:
  config: {model_type: llama}
data:
  path: stdlib
  sequence_length: 256
train:
  length: 10 steps
  tokens_per_step: 8192
optim:
  name: normuon
  lr: 1e-3
parallel:
  name: fsdp2
"""


def write(folder: Path, text: str = MINIMAL, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def every_key() -> list[str]:
    return [key for key in configuration.flatten(yaml.safe_load(MINIMAL)) if not key.startswith("model.config")]


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    assert configuration.load(write(tmp_path)).optim.lr == 1e-3


@pytest.mark.parametrize("key", every_key())
def test_a_typo_in_any_key_names_line_and_nearest(tmp_path: Path, key: str) -> None:
    last = key.rpartition(".")[2]
    lines = MINIMAL.splitlines()
    sections = key.split(".")
    number = 0
    for section in sections:
        number = next(i for i in range(number, len(lines)) if lines[i].strip().startswith(section + ":"))
    lines[number] = lines[number].replace(last + ":", last + "x:", 1)
    with pytest.raises(RunError) as error:
        configuration.load(write(tmp_path, "\n".join(lines)))
    if last == "name" and len(sections) > 1:  # the choice itself is gone
        assert "name is missing" in error.value.what
    else:
        assert f"unknown key {key}x" in error.value.what
        assert f"did you mean {last}?" in error.value.mend
    assert f"run.yaml:{number + 1 if last != 'name' or len(sections) == 1 else number}" in error.value.where


@pytest.mark.parametrize("key", every_key())
def test_a_typo_on_the_command_line_names_the_nearest(tmp_path: Path, key: str) -> None:
    last = key.rpartition(".")[2]
    with pytest.raises(RunError) as error:
        configuration.load(write(tmp_path), [f"--{key}x=1"])
    assert error.value.where == f"command line, --{key}x"
    assert f"did you mean {last}?" in error.value.mend


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optim.name=normun", "did you mean normuon"),
        ("--train.length=10", "has no unit"),
        ("--train.length=10 apples", "is no length"),
        ("--train.tokens_per_step=1000", "use 768 or 1024"),
        ("--train.tokens_per_step=lots", "is no count"),
        ("--seed=a", "integer"),
        ("--seed=1.5", "integer"),
        ("--train.time_limit=11", "is no duration"),
        ("--data.path=null", "needs one of data.path and data.table"),
        ("--evaluate.every=5 min", "in steps"),
        ("--name=../x", "pattern"),
        ("--optim.lr=-1", "greater than or equal to 0"),
        ("--model.config={}", "model_type is missing"),
        ("seed=3", "is not understood"),
        ("--metrics.sinks=[{name: wandbb}]", "did you mean wandb?"),
        ("--metrics.sinks=[{name: wandb, projct: p}]", "unknown key metrics.sinks.0.projct"),
        ("--metrics.sinks=[{name: wandb, projct: p}]", "did you mean project?"),
        ("--metrics.profile=[0, 3]", "greater than 0"),
        ("--metrics.groups_every=5 min", "in steps"),
        ("--metrics.sinks=[{name: mlflow, uri: 'https://me:hunter22@host'}]", "metrics.sinks holds credentials"),
        ("--data.path=https://me:hunter22@host/corpus", "data.path holds credentials"),
    ],
)
def test_bad_values_are_refused_with_a_mend(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RunError) as error:
        configuration.load(write(tmp_path), [override])
    assert words in str(error.value)
    assert error.value.mend
    assert error.value.outcome is Outcome.BAD_CONFIGURATION
    assert "hunter22" not in str(error.value)


MIXTURE = MINIMAL.replace(
    "  path: stdlib\n",
    "  mixture:\n    web: {path: stdlib, weight: 2/3}\n    code: {path: 'hub:a/b,split=x', weight: 1/3}\n",
)


@pytest.mark.parametrize(
    ("overrides", "what", "where", "mend"),
    [
        (["web.weight=0.6"], "sum to 0.933333333333", "run.yaml:5 (data.mixture)", "code 1/3, web 0.6"),
        (["web.weight=1.5"], "a share is from 0 to 1", "--data.mixture.web.weight", "correct"),
        (["web.weight=much"], "'much' is no share", "--data.mixture.web.weight", "correct"),
        (["web.weght=0.6"], "unknown key data.mixture.web.weght", "--data.mixture.web.weght", "did you mean weight?"),
        (["more.path=x"], "data.mixture.more.weight is missing", "run.yaml:5", "add"),
        (["web.weight=0.66666667", "code.weight=0.33333333"], "too fine", "run.yaml:5", "six decimals"),
        (["web.table=x"], "data.mixture.web needs one of", "run.yaml:6", "table"),
        (["web.table=x", "web.path=null"], "needs the tokenizer of the tables", "run.yaml:5", "x/tokenizer"),
        (["code.path=hub:a/b,splt=x"], "'splt=x' in 'hub:a/b,splt=x'", "--data.mixture.code.path", "split="),
        (["web.validation_path=hub:a b"], "names no dataset", "--data.mixture.web.validation_path", "hub:OWNER/NAME"),
    ],
)
def test_bad_mixtures_are_refused_with_line_and_mend(tmp_path: Path, overrides, what, where, mend) -> None:
    path = write(tmp_path, MIXTURE)
    assert configuration.parse(configuration.resolved(configuration.load(path))) == configuration.load(path)
    with pytest.raises(RunError) as error:
        configuration.load(path, [f"--data.mixture.{override}" for override in overrides])
    assert what in error.value.what
    assert where in error.value.where
    assert mend in error.value.mend


@pytest.mark.parametrize(
    ("override", "what", "mend"),
    [
        ("--data.path=stdlib", "data.path does nothing beside data.mixture", "data.mixture.web.path"),
        ("--data.text_key=body", "data.text_key does nothing", "data.mixture.web.text_key"),
        ("--train.length=3 epochs", "end at different steps", "'3 epochs of web'"),
        ("--train.length=3 epochs of wob", "end at different steps", "epochs of web"),
    ],
)
def test_keys_that_a_mixture_makes_meaningless_are_refused(tmp_path: Path, override, what, mend) -> None:
    with pytest.raises(RunError) as error:
        configuration.load(write(tmp_path, MIXTURE), [override])
    assert what in error.value.what
    assert mend in error.value.mend
    config = configuration.load(write(tmp_path, MIXTURE), ["--train.length=3 epochs of web"])
    assert split_length(config.train.length) == (3, "epochs of web")
    with pytest.raises(RunError, match="there is no mixture"):
        configuration.load(write(tmp_path), ["--train.length=3 epochs of web"])


def test_a_duplicate_key_and_broken_yaml_name_their_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stands twice") as error:
        configuration.load(write(tmp_path, MINIMAL + "name: again\n"))
    assert error.value.where.endswith(":15")
    with pytest.raises(RunError, match="no valid YAML"):
        configuration.load(write(tmp_path, "name: [1\n"))


def test_typo_exits_78_in_a_moment_and_without_torch(tmp_path: Path) -> None:
    """Within a second on the machines that it was made on: 8 times what Python and the two libraries take to start anywhere."""
    path = write(tmp_path, MINIMAL.replace("tokens_per_step", "tokens_per_stp"))
    code = "import sys; sys.argv = ['orthogon', 'run', sys.argv[1]]\nfrom launch.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    seconds: dict[str, list[float]] = {code: [], "import pydantic, tyro": []}
    for _ in range(3):  # the least of three: other work on the machine only ever adds
        for program, so_far in reversed(seconds.items()):
            started = time.monotonic()
            line = [sys.executable, "-c", program, str(path)]
            answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
            so_far.append(time.monotonic() - started)
    ours, bare = (min(some) for some in seconds.values())
    assert answer.returncode == 78
    assert "did you mean tokens_per_step?" in answer.stderr
    assert f"{path}:9" in answer.stderr
    assert answer.stdout.strip() == "False"
    assert ours < 8 * bare


def test_base_lies_below_the_file_and_the_command_line_above(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    path = write(tmp_path, "base: base.yaml\nname: child\noptim: {lr: 0.5}\ntrain: {length: 20 steps}\n")
    config = configuration.load(path, ["--train.length=1B tokens"])
    assert (config.name, config.optim.lr, config.optim.name) == ("child", 0.5, "normuon")
    assert config.train.length == "1000000000 tokens"
    assert config.train.tokens_per_step == 8192
    other = configuration.load(write(tmp_path, "base: base.yaml\nname: c\noptim: {name: adamw, beta1: 0.8}\n"))
    assert other.optim.beta1 == 0.8


def test_resolved_form_reads_back_equal(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path), ["--train.time_limit=1h30m", "--train.tokens_per_step=64k"][:1])
    again = configuration.parse(configuration.resolved(config))
    assert again == config
    text = yaml.safe_dump(configuration.resolved(config))
    assert configuration.load(write(tmp_path, text)) == config
    assert config.train.time_limit == 5400


def test_resume_may_change_cadence_but_not_the_model(tmp_path: Path) -> None:
    old = configuration.resolved(configuration.load(write(tmp_path)))
    new = configuration.resolved(
        configuration.load(write(tmp_path), ["--train.length=20 steps", "--parallel.name=single"])
    )
    assert configuration.check_resume(old, new)["train.length"] == ("10 steps", "20 steps")
    for override in ("--data.sequence_length=128", "--seed=1", "--optim.momentum=0.9", "--data.order_seed=1"):
        new = configuration.resolved(configuration.load(write(tmp_path), [override]))
        with pytest.raises(RunError, match="when the checkpoint was saved"):
            configuration.check_resume(old, new)


def test_schema_file_is_current() -> None:
    written = json.loads((ROOT / "configs/schema.json").read_text())
    assert written == configuration.json_schema(), "run `make schema`"
    assert (ROOT / "docs/config.md").read_text() == reference.markdown(), "run `make schema`"


# The shapes in configs/models are no runs: test_model_configs.py uses them below one. Nor are clusters: test_slurm_files.py; nor
# recipes: test_recipes.py, beside whose files lie the runs that they are made of.
RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name not in ("models", "clusters")]
RUNS = [path for path in RUNS if path.parent.name != "recipes" or path.stem.endswith("-run")]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_every_config_loads(path: Path) -> None:
    configuration.load(path)


def test_times_with_colons_stay_as_they_are_written(tmp_path: Path) -> None:
    source = Source.read(write(tmp_path, "a: 24:00:00\nb: 12_000\nc: 0x1f\nd: -7\ne: 0\n"))
    assert source.raw == {"a": "24:00:00", "b": 12000, "c": 31, "d": -7, "e": 0}


@given(st.integers(1, 10**12))
def test_counts_read_back(number: int) -> None:
    assert parse_count(str(number)) == number
    assert parse_count(number) == number


def test_human_units() -> None:
    assert [parse_count(t) for t in ("1B", "350M", "2e9", "1.5k", "4_096")] == [
        10**9,
        350 * 10**6,
        2 * 10**9,
        1500,
        4096,
    ]
    assert [parse_seconds(t) for t in ("11h30m", "30 min", "45 s", "1.5 h")] == [41400, 1800, 45, 5400]
    assert split_length("1B tokens") == (1e9, "tokens")
    assert split_length("1 epoch") == (1, "epochs")
    assert split_interval("500 steps") == (500, "steps")
    assert split_interval("30 min") == (1800, "seconds")
    for bad in ("1.5 steps", "0 steps", "-1 steps", "steps"):
        with pytest.raises(ValueError, match="."):
            split_length(bad)
