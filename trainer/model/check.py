"""What is asked of the real model before it trains: that it predicts from the past alone, and that its loss in chunks is
that of its own logits."""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.loss import cross_entropy, summed_loss
from trainer.outcome import RunError

LENGTH = 5


@torch.no_grad()
def check_model(model: Any, strategy: Any, precision: str, device: torch.device) -> None:
    """Two or three forwards of a few tokens, on all ranks alike.

    Raises:
        RunError: a later token changes the logits of earlier ones, or the loss in chunks is not the model's own.
    """
    core = getattr(model, "module", model)
    kind, was_training = core.config.model_type, model.training
    model.eval()
    tokens = torch.arange(1, LENGTH + 1, device=device).remainder(core.config.vocab_size)[None]
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1).remainder(core.config.vocab_size)
    # Compiling for these shapes would cost more than all of this.
    with torch.compiler.set_stance("force_eager"), strategy.context():
        own, changed = (model(input_ids=ids, use_cache=False).logits.float() for ids in (tokens, other))
        chunk = getattr(core, "loss_chunk", None)
        if chunk is not None:
            core.loss_chunk = 2
            in_chunks, core.loss_chunk = float(summed_loss(model, tokens, tokens)), chunk
    model.train(was_training)
    strategy.settle(model)
    difference = (own - changed).abs().amax(-1)[0].tolist()
    # Nothing moves in a decoder, but that tokens of a mixture of experts share their products with others.
    experts = getattr(core.config, "num_experts_per_tok", None) is not None
    if max(difference[:-1]) > (0.02 if experts and precision == "bf16" else 1e-4) * difference[-1]:
        raise RunError(
            f"{kind} sees later tokens: changing the last of {LENGTH} moved earlier logits by {max(difference[:-1]):.2g}",
            where="model.config",
            mend="use a decoder, or the key that makes this one (is_decoder: true)",
        )
    if chunk is not None:
        plain = float(cross_entropy(own, tokens))
        if abs(in_chunks - plain) > (2e-2 if precision == "bf16" else 1e-5) * abs(plain):
            raise RunError(
                f"{kind} gives a loss of {plain:.6f}, and in chunks of tokens {in_chunks:.6f}: its head looks beyond a token",
                where="train.loss_chunk",
                mend="leave train.loss_chunk out",
            )
