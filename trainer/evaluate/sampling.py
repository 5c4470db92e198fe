"""Tokens from a model, one at a time, with a key-value cache and one seed per prompt.

Every rank of a sharded model must call it alike; rank 0's choices are everybody's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    tokens: int = 128
    """Most new tokens."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together reach this probability (after top_k)."""
    seed: int = 0
    """Seed of the choices; each prompt draws from a stream of its own, named by this and its place among the prompts."""


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of the distribution of `logits` (V,); draws one number from `generator` unless the temperature is 0."""
    point = torch.zeros((), dtype=torch.float64)
    if sampling.temperature != 0:
        point = torch.rand((), generator=generator, dtype=torch.float64)
    return int(choose_rows(logits[None], point[None], sampling))


def choose_rows(logits: Tensor, points: Tensor, sampling: Sampling) -> Tensor:
    """One token (rows,) of each of the distributions of `logits` (rows, V), by inversion of their sums at `points`.

    Temperature, then top-k, then nucleus (Holtzman et al., arXiv 1904.09751), as `transformers` orders them.

    Args:
        points: (rows,) in [0, 1), fp64; of no effect at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values = logits.double() / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return _inverted(values.softmax(-1), points)
    values, order = values.sort(descending=True, stable=True)
    probabilities = values[:, : sampling.top_k].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    places = _inverted(probabilities.masked_fill(before >= sampling.top_p, 0.0), points)
    return order.gather(1, places[:, None])[:, 0]


def _inverted(weights: Tensor, points: Tensor) -> Tensor:
    """The places (rows,) at which the running sums of `weights` (rows, n) pass `points` (rows,) of their totals."""
    sums = weights.cumsum(-1)
    totals = sums[:, -1:]
    below = torch.nextafter(
        totals, torch.zeros_like(totals)
    )  # rounding may put a point at the total, behind which is nothing
    return torch.searchsorted(sums, torch.minimum(points[:, None] * totals, below), right=True)[:, 0]


@torch.no_grad()
def continuations(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    seeds: list[int],
    vocab_size: int,
    end: int | None,
    room: int,
    device: torch.device,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts; yields the next token of each prompt, None for those that have ended.

    Args:
        prompts: token ids, at least one and fewer than `room` each.
        seeds: the seed of each prompt's choices.
        vocab_size: tokens of the tokenizer; the model's vocabulary may be larger.
        end: the token that ends a text; it is not yielded.
        room: most tokens that the model takes, prompt included.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (prompts, width), from the right
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    left = [min(sampling.tokens, room - len(p)) for p in prompts]
    padded = bool((mask == 0).any())
    positioned = takes_positions(model)
    cache = None
    while True:
        more = {}
        if padded:  # a model takes its fastest way where nothing is masked
            more["attention_mask"] = mask
            if positioned:
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        answer = model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
        cache = answer.past_key_values
        logits = answer.logits[:, -1, :vocab_size].float().cpu()
        chosen: list[int | None] = [
            choose(row, sampling, generator) if room_left > 0 else None
            for row, generator, room_left in zip(logits, generators, left, strict=True)
        ]
        chosen = [None if token == end else token for token in _as_rank_zero(chosen, device)]
        left = [0 if token is None else count - 1 for token, count in zip(chosen, left, strict=True)]
        if all(token is None for token in chosen):
            return
        yield chosen
        if not any(left):
            return
        ids = torch.tensor([[token or 0] for token in chosen], device=device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def takes_positions(model: Any) -> bool:
    """Whether the model can be told the place of each token in its text."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _as_rank_zero(tokens: list[int | None], device: torch.device) -> list[int | None]:
    """The tokens that rank 0 chose: no rank goes on alone because its arithmetic differs in a bit."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tokens
    agreed = torch.tensor([-1 if token is None else token for token in tokens], device=device)
    dist.broadcast(agreed, 0)
    return [None if token < 0 else token for token in agreed.tolist()]
