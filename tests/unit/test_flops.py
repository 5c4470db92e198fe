"""FLOPs per token by formula are those that torch counts; MFU is unknown where the peak is."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import ARCHITECTURES, batch, tiny
from trainer.config import ModelConfig
from trainer.model.build import architecture, build
from trainer.model.flops import flops_per_token, peak_flops, peak_of, utilization
from trainer.model.loss import losses

DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", [*ARCHITECTURES, "deepseek_v3"])
def test_the_formula_is_what_torch_counts(name, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "deepseek_v3", DEEPSEEK)
    model = tiny(name)
    formula = flops_per_token(model, 16)
    model.set_attn_implementation("eager")  # torch does not count the backward of fused attention on the CPU
    model.set_experts_implementation("eager")
    inputs, targets = batch(2, 16, masked=0)
    with FlopCounterMode(display=False) as counter:
        losses(model, inputs, targets)[1].backward()
    assert formula == counter.get_total_flops() / inputs.numel()


def test_attention_grows_with_the_length_and_nothing_else() -> None:
    model = tiny("llama", length=4096)
    assert flops_per_token(model, 4096) - flops_per_token(model, 1024) == 3 * 2 * 2 * 32 * 2 * 3072


@pytest.mark.parametrize("config", [{"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
                                    {"model_type": "qwen3_next", "num_hidden_layers": 4}])  # fmt: skip
def test_what_the_formula_does_not_know_is_unknown(config) -> None:
    model = build(architecture(ModelConfig(config=config), vocab_size=301, bos=0, eos=1, max_length=16))
    assert flops_per_token(model, 16) is None
    assert utilization(None, 1000.0, 1e12, 1) is None


def test_peaks_are_those_of_known_devices_only() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_of("NVIDIA L40S", "bf16") == 362e12
    assert peak_of("NVIDIA GeForce GTX 1080", "bf16") is None
    assert utilization(6_000_000_000, 50_000.0, 1e15, 2) == pytest.approx(0.15)
    assert utilization(6, 1.0, None, 1) is None
