"""A model from a `transformers` configuration, on the meta device: shapes without storage."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainer.config import ModelConfig
from trainer.outcome import RunError


def architecture(model: ModelConfig, *, vocab_size: int, bos: int | None, eos: int | None, max_length: int) -> Any:
    """The `transformers` configuration with the tokenizer's facts filled in.

    Raises:
        RunError: unknown `model_type` or key (with the nearest known one), or values that do not fit together.
    """
    given = dict(model.config)
    kind = given.pop("model_type")
    if kind not in CONFIG_MAPPING:
        guess = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=1)
        mend = f"did you mean {guess[0]}?" if guess else "use a model_type of the transformers library"
        raise RunError(f"there is no model_type '{kind}'", where="model.config.model_type", mend=mend)
    known = _known_keys(CONFIG_MAPPING[kind])
    for key in given:
        if key not in known:
            guess = difflib.get_close_matches(key, sorted(known), n=1)
            mend = f"did you mean {guess[0]}?" if guess else f"see the documentation of {kind} in transformers"
            raise RunError(f"{kind} has no key {key}", where=f"model.config.{key}", mend=mend)
    vocab = given.pop("vocab_size", vocab_size)
    if vocab < vocab_size:
        raise RunError(
            f"model.config.vocab_size = {vocab} is smaller than the tokenizer's {vocab_size}: its ids would not fit",
            where="model.config.vocab_size",
            mend="leave it out, or raise it",
        )
    given.setdefault("max_position_embeddings", max_length)
    given.setdefault("bos_token_id", bos)
    given.setdefault("eos_token_id", eos)
    try:
        return AutoConfig.for_model(kind, vocab_size=vocab, **given)
    except Exception as error:  # the library raises its own kinds
        raise RunError(f"model.config: {_one_line(error)}", where="model.config", mend="correct the values") from None


def build(config: Any) -> nn.Module:
    """The causal language model of a configuration, on the meta device, in fp32.

    Raises:
        RunError: the architecture has no causal language model, or its values do not fit together.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:
        raise RunError(
            f"no causal language model can be built: {_one_line(error)}",
            where="model.config",
            mend="correct model.config",
        ) from None
    model.config.use_cache = False
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order: what the architecture itself calls indivisible."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights (tied ones once) and persistent buffers, by the names that checkpoints use."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict().keys()
    return tensors | {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once; those that ZeRO has taken apart, by the size they had."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _known_keys(config_class: type) -> set[str]:
    known = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    return known | set(config_class().to_dict())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
