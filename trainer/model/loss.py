"""The loss of next-token prediction as a sum, so that its division by the global token count happens once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100


def summed_loss(model: Any, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of the targets that are not masked, in nats and fp32.

    Args:
        inputs: (rows, L) token ids.
        targets: (rows, L) next token ids, `MASKED` where nothing is predicted.
        positions: (rows, L) places in the documents, which keep them apart; None lets tokens attend across documents.
    """
    logits = model(**model_inputs(inputs, positions)).logits  # (rows, L, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=MASKED, reduction="sum")


def model_inputs(inputs: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """What a model is called with.

    transformers finds the documents of a row from positions that begin anew, but only without an attention mask and
    without a cache; with either it lets tokens attend to all documents, and says nothing.
    """
    extra = {} if positions is None else {"position_ids": positions}
    return {"input_ids": inputs, "use_cache": False} | extra


@torch.no_grad()
def token_count(targets: Tensor) -> int:
    """Targets that are predicted."""
    return int((targets != MASKED).sum())
