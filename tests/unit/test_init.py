"""Initial weights are those of the architecture's own rule, also where it acts on modules below."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import ARCHITECTURES, tiny
from trainer.config import ModelConfig
from trainer.model.build import architecture, as_json, build, from_json
from trainer.model.init import initialize, rule_calls
from trainer.outcome import RunError

# Rules that act on weights of modules below, besides GPT-2's: zeros of a projection, state spaces, gates of experts.
MORE = {
    "nanochat": {"model_type": "nanochat", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gpt_neo": {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]]},
    "bloom, tied": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_every_weight_has_the_librarys_distribution(name, monkeypatch) -> None:
    """Constants are equal, drawn weights have the same mean and deviation as those that `transformers` draws itself."""
    for key, config in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, key, config)
    ours = tiny(name, vocabulary=1024)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(from_json(as_json(ours.config)), dtype=torch.float32)
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        mine = found[key].detach()
        assert mine.isfinite().all(), key
        if not value.is_floating_point() or value.numel() < 2 or value.float().std() == 0 or "inv_freq" in key:
            assert torch.equal(mine, value.detach()), key
        elif value.numel() >= 256:
            value = value.detach()
            error = float(value.std()) / math.sqrt(value.numel())
            assert abs(float(mine.std() / value.std()) - 1) < 8 / math.sqrt(value.numel()), key
            assert abs(float(mine.mean() - value.mean())) < 8 * error, key


def test_projections_into_the_residual_stream_of_gpt2_are_smaller() -> None:
    model = tiny("gpt2, tied", n_embd=128, n_layer=8)
    deviations = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
    scaled = [value for name, value in deviations.items() if "c_proj" in name]
    others = [value for name, value in deviations.items() if "c_proj" not in name]
    assert len(scaled) == 16
    assert scaled == pytest.approx([0.02 / math.sqrt(16)] * 16, rel=0.05)
    assert others == pytest.approx([0.02] * len(others), rel=0.05)


def test_a_tied_weight_is_the_embeddings() -> None:
    tied, untied = tiny("gemma, tied"), tiny("gemma, tied", tie_word_embeddings=False)
    assert torch.equal(tied.lm_head.weight, untied.model.embed_tokens.weight)
    padding = tied.model.embed_tokens.padding_idx
    assert padding is None or not tied.model.embed_tokens.weight[padding].any()


def test_a_weight_without_a_rule_is_refused_by_name() -> None:
    config = {
        "model_type": "apertus",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = build(architecture(ModelConfig(config=config), vocab_size=64, bos=0, eos=1, max_length=16))
    with pytest.raises(RunError, match="does not say in transformers how model.layers.0.mlp.act_fn.alpha_n starts"):
        initialize(model, 0, torch.device("cpu"))


def test_the_calls_of_a_rule_are_found_without_storage() -> None:
    calls = {name: written for name, _, written in rule_calls(build(tiny("gpt2, tied").config)) if written}
    assert calls["transformer.h.1.mlp"] == ["transformer.h.1.mlp.c_proj.weight"]
    assert "lm_head" not in calls
    assert list(calls).index("transformer.h.1.mlp.c_proj") < list(calls).index("transformer.h.1.mlp")
