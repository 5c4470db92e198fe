"""What a strategy refuses before any rank starts, and the files that strategies are."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import pytest

from tests.unit.test_config import MINIMAL, write
from trainer import config as configuration
from trainer.outcome import RunError
from trainer.parallel import deepspeed
from trainer.registry import alternatives

STRATEGIES = alternatives("trainer.parallel")


@pytest.mark.parametrize(
    ("overrides", "what", "where"),
    [
        (
            ["--parallel={name: deepspeed}"],
            "normuon, which works on whole matrices, and deepspeed flattens",
            "parallel.name",
        ),
        (
            ["--parallel={name: deepspeed, stage: 2, offload_parameters: true}", "--optim={name: adamw}"],
            "parallel.offload_parameters needs partitioned parameters, and parallel.stage is 2",
            "parallel",
        ),
        (
            ["--parallel={name: deepspeed}", "--optim={name: adamw}", "--train.micro_batch_size=auto"],
            "auto works with fsdp2, ddp and single, not with deepspeed",
            "train.micro_batch_size",
        ),
        (
            ["--parallel={name: deepspeed, stage: 3}", "--optim={name: adamw}", "--train.loss_chunk=64"],
            "parallel.stage: 3 gathers them for one call only",
            "train.loss_chunk",
        ),
        (
            [
                "--parallel={name: deepspeed, stage: 3}",
                "--optim={name: adamw}",
                "--train.activation_checkpointing=selective",
            ],
            "parallel.stage: 3 gathers parameters among them",
            "train.activation_checkpointing",
        ),
        (["--parallel.spread_replicas=true"], "parallel.replicate is 1", "parallel.spread_replicas"),
        (
            ["--parallel={name: fsdp2, replicate: 2, spread_replicas: true}", "--optim={name: auon}"],
            "divides work on whole matrices among replicas, and auon has none",
            "parallel",
        ),
        (["--parallel={name: deepspeed, stage: 4}", "--optim={name: adamw}"], "stage", "parallel"),
        (["--parallel.replicate=0"], "parallel.replicate", "parallel.replicate"),
    ],
)
def test_what_cannot_work_is_refused_with_the_mend(tmp_path, overrides, what, where) -> None:
    with pytest.raises(RunError) as error:
        configuration.load(write(tmp_path, MINIMAL), overrides)
    assert what in error.value.what
    assert where in error.value.where
    assert error.value.mend


def test_deepspeed_with_adamw_is_a_configuration_also_where_it_is_not_installed(tmp_path, monkeypatch) -> None:
    """Reading a checkpoint's configuration needs no extra; a rank that would need it says what to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    config = configuration.load(write(tmp_path, MINIMAL), ["--parallel={name: deepspeed}", "--optim={name: adamw}"])
    with pytest.raises(RunError) as error:
        deepspeed.Strategy(config.parallel, "fp32", None, 2)
    assert "not installed" in error.value.what
    assert "pip install 'orthogon[deepspeed]'" in error.value.mend


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_all_parts(name) -> None:
    module = STRATEGIES[name]
    assert list(inspect.signature(module.check).parameters) == ["options", "optimizer", "train"]
    single = STRATEGIES["single"].Strategy
    assert module.Strategy is single or module.Strategy.__bases__ == (single,)
    assert {n for n in vars(module.Strategy) if not n.startswith("_")} - set(vars(single)) <= {
        "reductions",
        "first",
        "settings",
    }


def test_strategies_load_no_torch() -> None:
    code = "import sys, trainer.parallel.fsdp2, trainer.parallel.ddp, trainer.parallel.deepspeed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
