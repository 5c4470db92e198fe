"""A model from a `transformers` configuration, on the meta device: shapes without storage."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.config import ModelConfig
from trainer.model import library
from trainer.outcome import RunError


def architecture(
    model: ModelConfig, *, vocab_size: int, bos: int | None, eos: int | None, max_length: int,
    below: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The `transformers` configuration with the tokenizer's facts filled in.

    Args:
        below: the configuration of the weights to start from, as JSON values; `model.config` is laid over it.

    Raises:
        RunError: unknown `model_type` or key (with the nearest known one), or values that do not fit together.
    """
    base = dict(below or {})
    given = dict(model.config)
    kind = given.pop("model_type", None) or base.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise library.unknown_type(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "model.config")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise library.no_head(kind, "model.config")
    if below is not None and kind != base.pop("model_type"):
        raise RunError(
            f"model.config.model_type is {kind}, the weights of model.init_from are of another architecture",
            where="model.config.model_type",
            mend="leave model.config out: it comes with the weights",
        )
    known = known_keys(CONFIG_MAPPING[kind])
    for key in given:
        if key not in known:
            raise library.unknown_key(kind, key, known, "model.config")
    if below is None:
        given.setdefault("vocab_size", vocab_size)
        if not known.isdisjoint(("max_position_embeddings", "n_positions")) and "n_positions" not in given:
            given.setdefault("max_position_embeddings", max_length)
        given.setdefault("bos_token_id", bos)
        given.setdefault("eos_token_id", eos)
    shape = from_json({"model_type": kind, **base, **given})
    _check_sizes(shape, vocab_size, max_length)
    return shape


def _check_sizes(shape: Any, vocab_size: int, max_length: int) -> None:
    if shape.vocab_size < vocab_size:
        raise RunError(
            f"model.config.vocab_size = {shape.vocab_size} is smaller than the tokenizer's {vocab_size}: its ids would not fit",
            where="model.config.vocab_size",
            mend="leave it out, or raise it",
        )
    room = getattr(shape, "max_position_embeddings", None)
    if isinstance(room, int) and room < max_length:
        raise RunError(
            f"model.config has room for {room} positions and data.sequence_length is {max_length}",
            where="model.config.max_position_embeddings",
            mend="raise max_position_embeddings, or shorten the sequences",
        )


def known_keys(config_class: type) -> set[str]:
    """The keys of an architecture's configuration class and their aliases."""
    known = {field.name for field in fields(config_class)} | set(getattr(config_class, "attribute_map", ()))
    return known | library.ROTARY if "rope_parameters" in known else known


def as_json(shape: Any) -> dict[str, Any]:
    """A `transformers` configuration as JSON values, `model_type` among them; `from_json` reads it back."""
    values: dict[str, Any] = json.loads(shape.to_json_string(use_diff=False))
    return values


def from_json(values: dict[str, Any]) -> Any:
    """The `transformers` configuration of `as_json`, or of a `config.json`."""
    rest = dict(values)
    kind = rest.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **rest)
    except Exception as error:  # the library raises its own kinds
        raise RunError(f"model.config: {_one_line(error)}", where="model.config", mend="correct the values") from None


def build(config: Any) -> nn.Module:
    """The causal language model of a configuration, on the meta device, in fp32, with the attention that the library
    takes for it: SDPA, or eager where SDPA cannot do what the architecture asks (soft-capped scores).

    Raises:
        RunError: the architecture has no causal language model, or its values do not fit together.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise RunError(
            f"no causal language model can be built: {_one_line(error)}",
            where="model.config",
            mend="correct model.config",
        ) from None
    model.config.use_cache = False
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order and never nested: the layers that the library can checkpoint, else what the
    architecture calls indivisible."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for is_block in (lambda m: isinstance(m, GradientCheckpointingLayer), lambda m: type(m).__name__ in names):
        found = _outermost(model, is_block)
        if found:
            return found
    return []


def _outermost(module: nn.Module, wanted: Any) -> list[nn.Module]:
    return [m for child in module.children() for m in ([child] if wanted(child) else _outermost(child, wanted))]


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once; those that ZeRO has taken apart, by the size they had."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def model_tensors(model: Any) -> dict[str, Tensor]:
    """Weights (tied ones once) and persistent buffers, by the names that checkpoints use."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict().keys()
    return tensors | {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
