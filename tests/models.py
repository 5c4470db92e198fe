"""Tiny models of every architecture that the tests know, and what holds of them."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import ModelConfig
from trainer.model.build import architecture, build
from trainer.model.init import initialize

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

# A name for each, and its `model.config`. Gemma and GPT-2 tie their embeddings unless told otherwise.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GROUPED},
    "llama, tied": {"model_type": "llama", **_GROUPED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_GEMMA},
    "qwen3, tied": {"model_type": "qwen3", **_GEMMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 8},
    "gemma, tied": {"model_type": "gemma", **_GEMMA},
    "gemma2, tied": {"model_type": "gemma2", **_GEMMA, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt2, tied": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "cohere, tied": {"model_type": "cohere", **_GROUPED},
    "opt, tied": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "mixtral": {"model_type": "mixtral", **_GROUPED, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **_GROUPED, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24,
                  "mlp_only_layers": [1]},
    "gpt_oss": {"model_type": "gpt_oss", **_GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def tiny(name: str, *, vocabulary: int = 301, length: int = 16, seed: int = 0, **changes: Any) -> Any:
    """The model of a name on the CPU, initialized."""
    config = ModelConfig(config=ARCHITECTURES[name] | changes)
    model: Any = build(architecture(config, vocab_size=vocabulary, bos=0, eos=1, max_length=length))
    initialize(model, seed, torch.device("cpu"))
    return model


def batch(rows: int, length: int, vocabulary: int = 301, masked: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets) of random tokens; the first `masked` targets are."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(0, vocabulary, (2, rows, length), generator=generator)
    targets.view(-1)[:masked] = -100
    return inputs, targets
