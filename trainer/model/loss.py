"""The loss of next-token prediction as a sum, so that its division by the global token count happens once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100


def summed_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of the targets that are not masked, in nats and fp32.

    Args:
        inputs: (rows, L) token ids.
        targets: (rows, L) next token ids, `MASKED` where nothing is predicted.
    """
    logits = model(input_ids=inputs, use_cache=False).logits  # (rows, L, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=MASKED, reduction="sum")


@torch.no_grad()
def token_count(targets: Tensor) -> int:
    """Targets that are predicted."""
    return int((targets != MASKED).sum())
