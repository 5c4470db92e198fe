"""The loss of next-token prediction as a sum, so that its division by the global token count happens once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100


def summed_loss(model: Any, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of the targets that are not masked, in nats and fp32 (fp64 for fp64 logits).

    Args:
        inputs: (rows, L) token ids.
        targets: (rows, L) next token ids, `MASKED` where nothing is predicted.
        positions: (rows, L) places in the documents, which keep them apart; None lets tokens attend across documents.
    """
    return losses(model, inputs, targets, positions)[0]


def losses(
    model: Any, inputs: Tensor, targets: Tensor, positions: Tensor | None = None, against: Any = None
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy, what to differentiate): the second adds the balancing loss of a mixture of experts.

    With `against`, what a teacher says about these tokens, the first is the mixed loss of `trainer.ensemble.divergence`.

    Experts are balanced if the architecture's configuration says `output_router_logits: true`: its own auxiliary loss,
    a mean over this micro-batch, times its `router_aux_loss_coef` and the predicted tokens of the micro-batch.
    """
    core = getattr(model, "module", model)  # a wrapper such as DDP calls the model it holds
    if against is not None:
        loss, balance = model(**model_inputs(inputs, positions), targets=targets, against=against)
    elif getattr(core, "loss_chunk", None) is not None:
        loss, balance = model(**model_inputs(inputs, positions), targets=targets)
    else:
        output = model(**model_inputs(inputs, positions))
        loss, balance = cross_entropy(output.logits, targets), getattr(output, "aux_loss", None)
    if balance is None or not torch.is_grad_enabled():
        return loss, loss
    return loss, loss + core.config.router_aux_loss_coef * token_count(targets) * balance.to(loss.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets that are not masked; logits (..., vocabulary)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=MASKED, reduction="sum")


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
