"""Cross-entropy in chunks of tokens: no tensor of tokens x vocabulary exists, forward or backward.

The head is the model's own forward with its decoder replaced by hidden states that are there already, so soft-capped
or scaled logits, biases and tied weights need no case of their own. Each chunk's logits are made once, in the forward,
with their gradients at once; kept for the backward are the gradients of the hidden states (tokens x d) and of the head
(vocabulary x d), the latter summed in fp32. `torch.nn.functional.linear_cross_entropy` does the same for a bare linear
head only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.loss import cross_entropy
from trainer.outcome import RunError


def install(model: Any, chunk: int) -> None:
    """Make `model(input_ids=..., targets=...)` return (summed loss, balancing loss or None), `chunk` tokens at a time.

    Without `targets` the model answers as before. To be called before the model is sharded: its hooks then surround all
    of it, and the head's gathered weights are there.

    Raises:
        RunError: the architecture does not keep its decoder apart from its head.
    """
    decoder = decoder_of(model)
    if decoder is None:
        raise _no_decoder(model)
    own = model.forward

    def forward(*arguments: Any, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return own(*arguments, **options)
        chunk = model.loss_chunk
        found = decoded(own, decoder, arguments, options)
        if found is None:
            raise _no_decoder(model)
        hidden, kind, balance = found
        head = head_of(own, decoder, kind, model.config)
        flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if torch.is_grad_enabled():
            return _SummedLoss.apply(head, chunk, flat, wanted, *head_parameters(model, decoder)), balance
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for piece, some in zip(flat.split(chunk), wanted.split(chunk), strict=True):
            loss = cross_entropy(head(piece), some)
            total += loss
        return total.to(loss.dtype), balance

    model.forward = forward
    model.loss_chunk = chunk


def decoder_of(model: Any) -> nn.Module | None:
    """The part of a model that makes the hidden states that its head turns into logits; None if it is not kept apart."""
    known = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    found = next((module for module in known if module not in (None, model)), None)
    return found if isinstance(found, nn.Module) else None


def _no_decoder(model: Any) -> RunError:
    return RunError(
        f"{model.config.model_type} does not keep its decoder apart from its head: logits cannot be made in chunks",
        where="train.loss_chunk",
        mend="leave train.loss_chunk out",
    )


def decoded(
    own: Callable[..., Any], decoder: Any, arguments: Any, options: Any
) -> tuple[Tensor, Any, Tensor | None] | None:
    """Hidden states (rows, L, d) as the model's own forward makes them, their kind of output, and its balancing loss;
    None if it does not call the decoder."""
    true, kept = decoder.forward, []

    def first_token(*arguments: Any, **options: Any) -> Any:
        output = true(*arguments, **options)
        kept.append((output.last_hidden_state, type(output)))
        output.last_hidden_state = output.last_hidden_state[:, :1]
        return output

    with _instead(decoder, first_token):
        answer = own(*arguments, **options)
    return (*kept[0], getattr(answer, "aux_loss", None)) if kept else None


def head_of(own: Callable[..., Any], decoder: Any, kind: Any, config: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states (tokens, d) -> logits (1, tokens, vocabulary), by the model's own forward."""
    router = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}

    def head(hidden: Tensor) -> Tensor:
        with _instead(decoder, lambda *_, **__: kind(last_hidden_state=hidden[None])):
            logits: Tensor = own(input_ids=None, use_cache=False, **router).logits
        return logits

    return head


def head_parameters(model: Any, decoder: Any) -> list[Tensor]:
    """All weights that act after the decoder; tied ones too. Under FSDP2 within a forward: the gathered ones."""
    inside = set(decoder.parameters())
    head = model.get_output_embeddings()
    tied = head.parameters() if head is not None else ()
    return list(dict.fromkeys([*(p for p in model.parameters() if p not in inside), *tied]))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Any, chunk: int, hidden: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        wide = [torch.promote_types(w.dtype, torch.float32) for w in weights]
        sums = [torch.zeros_like(w, dtype=dtype) for w, dtype in zip(weights, wide, strict=True)]
        by_hidden = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        trained = [w for w in weights if w.requires_grad]
        used = [False] * len(weights)
        for piece, target, slot in zip(hidden.split(chunk), targets.split(chunk), by_hidden.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                loss = cross_entropy(head(leaf), target)
                first, *rest = torch.autograd.grad(loss, [leaf, *trained], allow_unused=True)
            slot.copy_(first)
            gradients = iter(rest)
            for index, (weight, summed) in enumerate(zip(weights, sums, strict=True)):
                gradient = next(gradients) if weight.requires_grad else None
                if gradient is not None:
                    summed += gradient
                    used[index] = True
            total += loss.detach()
            dtype = loss.dtype
            del loss, leaf, first, rest, gradients, gradient  # one chunk at a time
        ctx.save_for_backward(by_hidden, *sums)
        ctx.dtypes = [w.dtype if u else None for w, u in zip(weights, used, strict=True)]
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        by_hidden, *sums = ctx.saved_tensors
        scaled = [None if d is None else s.mul_(outer[0]).to(d) for s, d in zip(sums, ctx.dtypes, strict=True)]
        return None, None, by_hidden.mul_(outer[0]), None, *scaled


@contextmanager
def _instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module answer by `forward` for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
