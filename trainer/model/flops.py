"""Floating-point operations per trained token, by formula, and the share of a device's peak that a run reaches.

Counted are matrix products, two operations per multiplication: every weight matrix a token passes (of the experts those
that it is routed to; the head, tied or not; no embedding), and attention in full, masked pairs included, as the peak of
a device counts them (Chowdhery et al., arXiv 2204.02311, appendix B). A backward takes twice a forward; what activation
checkpointing computes again is not counted.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.model.peaks import peak_of

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def flops_per_token(model: Any, length: int) -> int | None:
    """Operations per trained token in sequences of `length` tokens; None where the architecture has parts that the
    formula does not know (convolutions, recurrences, linear attention).

    Args:
        model: before it is sharded or compiled; on the meta device is enough.
    """
    products = _products(model)
    attention = _attention(model.config, length)
    return None if products is None or attention is None else 3 * (products + attention)


def _products(model: Any) -> int | None:
    """Operations of a token's weight matrices in a forward."""
    total = 0.0
    for name, module in model.named_modules():
        share = _routed_share(model.config) if re.search(r"(^|\.)experts(\.|$)", name) else 1.0
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            known = isinstance(module, (nn.Linear, Conv1D)) or "Router" in type(module).__name__
            if not known and not (parameter.ndim == 3 and share is not None and share < 1):
                if share is not None and share < 1 and parameter.ndim == 2:
                    continue  # the biases of all experts
                return None
            if share is None:
                return None
            total += 2 * parameter.numel() * share
    return round(total)


def _routed_share(config: Any) -> float | None:
    """The share of the experts that a token is routed to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    every = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, key, None))),
        None,
    )
    return chosen / every if chosen and every else None


def _attention(config: Any, length: int) -> int | None:
    """Operations of a token's attention in a forward: scores and their sum over values, in every layer."""
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return None
    if not ATTENTION_LAYERS.issuperset(getattr(config, "layer_types", None) or ()):
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys, values = getattr(config, "qk_head_dim", None) or head, getattr(config, "v_head_dim", None) or head
    return 2 * layers * heads * (keys + values) * length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second of a device in `bf16` or `fp32`; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def utilization(flops: int | None, tokens_per_second: float, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilization: the share of the devices' peak that goes into the formula's operations; None if unknown."""
    return None if flops is None or peak is None else flops * tokens_per_second / (peak * devices)
