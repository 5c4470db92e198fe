"""Activation checkpointing: what a block's forward keeps for its backward, and what it computes again.

`none` keeps everything; `full` keeps a block's input and runs its forward again (Chen et al., arXiv 1604.06174);
`selective` keeps the results of `SAVED`, the operations that cost most, and computes all others again: norms,
activation functions, rotary embeddings, softmax, sums. The recomputed values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
# Matrix products and fused attention, on the CPU and on CUDA. Operations that a build of torch lacks are left out.
_NAMES = (
    "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
SAVED = frozenset(getattr(aten, name).default for name in _NAMES if hasattr(aten, name))


def checkpointed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """A block's forward that keeps only what `mode` says: `full` or `selective`."""
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}

    def recomputed(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, **context, **options)

    return recomputed


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
