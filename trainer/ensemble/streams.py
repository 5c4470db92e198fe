"""Text that a model makes up from nothing: streams of packed documents, a batch of them at a time.

A stream is what a row of training is: L + 1 tokens, the first of which begins a document. Where a document ends the next
one goes on in the same row, as in packed training text, so that no row waits for another. Token t of stream s comes from
number t of a Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") whose key is
(seed, s): it depends neither on the batch nor on who decodes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from trainer.data.masking import Borders
from trainer.evaluate.sampling import Sampling, choose_rows, takes_positions
from trainer.model.init import module_seed
from trainer.outcome import RunError


@dataclass(frozen=True)
class Streams:
    """A batch of streams, with what the model that made them says of them at temperature 1."""

    tokens: NDArray[np.int64]
    """(rows, L + 1)."""
    losses: NDArray[np.float64]
    """(rows,), sums of the negative log-likelihoods of the sampled tokens, nats."""
    entropies: NDArray[np.float64]
    """(rows,), sums of the entropies of the distributions that they were sampled from, nats."""
    sampled: NDArray[np.int64]
    """(rows,), tokens that were sampled: all L but for a BOS that nothing else can follow."""


def points(seed: int, stream: int, length: int) -> NDArray[np.float64]:
    """The numbers (length,) in [0, 1) that the tokens of a stream are drawn by."""
    key = np.array([module_seed(seed, "streams"), stream], np.uint64)
    return (np.random.Philox(key=key).random_raw(length) >> np.uint64(11)) * 2.0**-53


@torch.no_grad()
def decode(
    model: Any, streams: range, length: int, sampling: Sampling, *, vocab_size: int, borders: Borders, apart: bool,
    device: torch.device,
) -> Streams:  # fmt: skip
    """Decode some streams together.

    The logits of a row depend in their last bits on the number of rows beside it, so that the same streams must be decoded in the same batches.

    Args:
        model: takes `past_key_values`; in evaluation mode.
        length: tokens of a stream behind its first, L.
        sampling: `temperature`, `top_k`, `top_p` and `seed` count.
        vocab_size: tokens of the tokenizer; the model's vocabulary may be larger.
        apart: let no token see another document than its own, as in training with `data.document_masking`; a BOS then
            follows every EOS, which nothing was learned about.

    Raises:
        RunError: the architecture has no key-value cache, or cannot keep documents apart in it.
    """
    drawn = torch.from_numpy(np.stack([points(sampling.seed, stream, length) for stream in streams])).to(device)
    first = borders.bos if borders.bos is not None else borders.eos
    assert first is not None, "a tokenizer of a run marks beginnings or ends"
    if apart and not takes_positions(model):
        raise _refused(model, "cannot keep documents apart while it decodes")
    tokens = torch.full((len(streams), length + 1), first, device=device)
    found = torch.zeros(3, len(streams), dtype=torch.float64, device=device)
    starts = torch.zeros(len(streams), dtype=torch.int64, device=device)
    cache = reserved(model, length)
    for place in range(length):
        here, more = tokens[:, place], {}
        if apart:
            begins = _begins(here, borders, tokens[:, place - 1] if place else None)
            starts = torch.where(begins, place, starts)
            more["attention_mask"] = (torch.arange(place + 1, device=device) >= starts[:, None]).long()
            more["position_ids"] = (place - starts)[:, None]
        answer = model(input_ids=here[:, None], past_key_values=cache, use_cache=True, **more)
        cache = answer.past_key_values
        if cache is None:
            raise _refused(model, "has no key-value cache that it gives back")
        logits = answer.logits[:, -1, :vocab_size].double()
        if apart and borders.bos == borders.eos:  # two of one id are a border, which ends no document that just began
            logits[begins, borders.eos] = -torch.inf
        logs = logits.log_softmax(-1)
        chosen = choose_rows(logits, drawn[:, place], sampling)
        forced = torch.zeros_like(chosen, dtype=torch.bool)
        if apart and borders.bos is not None and borders.eos is not None:
            forced = (here == borders.eos) & ((borders.bos != borders.eos) | ~begins)
            chosen = torch.where(forced, borders.bos, chosen)
        tokens[:, place + 1] = chosen
        loss = -logs.gather(1, chosen[:, None])[:, 0]
        entropy = torch.special.entr(logs.exp()).sum(-1)
        found += torch.stack([loss, entropy, torch.ones_like(loss)]).masked_fill(forced, 0.0)
    losses, entropies, sampled = found.cpu().numpy()
    return Streams(tokens.cpu().numpy(), losses, entropies, sampled.astype(np.int64))


def _begins(here: Tensor, borders: Borders, before: Tensor | None) -> Tensor:
    """Which rows begin a document with this token; as `trainer/data/masking.py` has it."""
    if before is None:
        return torch.ones_like(here, dtype=torch.bool)
    if borders.bos is None:
        return here == borders.eos
    return (here == borders.bos) & ((before == borders.eos) | (borders.bos != borders.eos))


def reserved(model: Any, length: int) -> Any:
    """A key-value cache with room for `length` tokens, in place of one that is copied at every token.

    Architectures that keep anything but all keys and values get None, and make their own.
    """
    if hasattr(model, "members"):
        caches = [reserved(member, length) for member in model.members]
        return None if None in caches else caches
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return Cache(layers=[_Reserved(length) for _ in cache.layers])


class _Reserved(DynamicLayer):
    """Keys and values (rows, heads, tokens, width) in the first part of tensors that are as large as they can become."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._room = [
                states.new_empty(*states.shape[:2], self.length, states.shape[3])
                for states in (key_states, value_states)
            ]
        last = self.filled + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, self.filled : last] = states
        self.filled = last
        self.keys, self.values = (room[:, :, :last] for room in self._room)
        return self.keys, self.values


def _refused(model: Any, what: str) -> RunError:
    return RunError(
        f"{model.config.model_type} {what}: no text can be sampled from it",
        where="model.config.model_type",
        mend="use another architecture as the teacher",
    )
