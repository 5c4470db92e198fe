"""What the source of `transformers` tells of architectures is what the library itself knows."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import ARCHITECTURES
from trainer.model import library
from trainer.outcome import RunError

ROOT = Path(__file__).parents[2]


def test_keys_read_from_the_source_are_those_of_the_classes() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from trainer.model.build import known_keys

    assert library._causal() == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = {config["model_type"] for config in ARCHITECTURES.values()} | {"deepseek_v3", "mamba", "phi3", "qwen2_moe"}
    for kind in kinds:
        assert library.known_keys(kind) == known_keys(CONFIG_MAPPING[kind]), kind


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "vit"}, "vit has no causal language model head"),
        ({"model_type": "t5"}, "t5 has no causal language model head"),
        ({"model_type": "llama", "hiden_size": 64}, "did you mean hidden_size"),
        ({"model_type": "gpt2", "n_head": 4, "n_layers": 4}, "did you mean n_layer"),
    ],
)
def test_what_it_does_not_know_is_refused(config, words) -> None:
    with pytest.raises(RunError) as error:
        library.check(config)
    assert words in str(error.value)


def test_aliases_and_rotary_keys_are_known_and_take_effect() -> None:
    from trainer.config import ModelConfig
    from trainer.model.build import architecture

    library.check({"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 2})
    library.check({"model_type": "llama", "rope_theta": 500000.0})
    facts = {"vocab_size": 64, "bos": 0, "eos": 1, "max_length": 8}
    gpt2 = architecture(ModelConfig(config={"model_type": "gpt2", "hidden_size": 64}), **facts)
    assert (gpt2.n_embd, gpt2.n_positions) == (64, 8)
    llama = architecture(ModelConfig(config={"model_type": "llama", "rope_theta": 500000.0}), **facts)
    assert llama.rope_parameters["rope_theta"] == 500000.0


def test_a_typo_in_model_config_is_told_before_anything_starts(tmp_path: Path) -> None:
    text = (ROOT / "configs/quickstart.yaml").read_text().replace("hidden_size: 192", "hiden_size: 192")
    (tmp_path / "run.yaml").write_text(text)
    began = time.monotonic()
    command = [sys.executable, "-m", "launch.cli", "run", str(tmp_path / "run.yaml"), f"--runs={tmp_path}/runs"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 78
    assert "did you mean hidden_size?" in answer.stderr
    assert f"{tmp_path}/run.yaml:9" in answer.stderr
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - began < 5  # no torch, no ranks


def test_positions_and_vocabularies_that_are_too_few_are_refused() -> None:
    from trainer.config import ModelConfig
    from trainer.model.build import architecture

    for config, words in (
        ({"n_positions": 8}, "room for 8 positions"),
        ({"vocab_size": 60}, "smaller than the tokenizer's 64"),
    ):
        with pytest.raises(RunError, match=words):
            architecture(
                ModelConfig(config={"model_type": "gpt2"} | config), vocab_size=64, bos=0, eos=1, max_length=16
            )


def test_weights_that_are_not_there_are_told_before_a_run_folder_is_made(tmp_path: Path) -> None:
    from trainer import config as configuration
    from trainer import runfolder

    overrides = [f"--runs={tmp_path}/runs", "--model.config={}", f"--model.init_from={tmp_path}/none"]
    with pytest.raises(RunError, match="would train a new one") as error:
        configuration.load(ROOT / "configs/quickstart.yaml", overrides)
    assert "data.tokenizer.path" in error.value.mend
    config = configuration.load(
        ROOT / "configs/quickstart.yaml", [*overrides, f"--data.tokenizer.path={tmp_path}/none"]
    )
    with pytest.raises(RunError, match="there is no folder"):
        runfolder.create(config, ["test"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--train.micro_batch_size=lots", "train.micro_batch_size"),
        ("--train.micro_batch_size=0", "greater than 0"),
        ("--train.activation_checkpointing=some", "'none', 'full' or 'selective'"),
        ("--train.loss_chunk=0", "greater than 0"),
        ("--model.init_frm=x", "did you mean init_from"),
    ],
)
def test_bad_values_are_refused(override: str, words: str) -> None:
    from trainer import config as configuration

    with pytest.raises(RunError) as error:
        configuration.load(ROOT / "configs/quickstart.yaml", [override])
    assert words in str(error.value)
