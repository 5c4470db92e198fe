"""The forms of cached targets: what is kept of a teacher's distributions, and in which bytes.

| form | holds | error |
|---|---|---|
| hidden | hidden states of all members, bf16 or fp32; heads once | that of the rounding; none under fp32 |
| top-k | the k likeliest tokens, log(p_i / p_1) in fp16, and the mass of all others | below |
| sampled | counts of N draws from the distribution (arXiv 2503.16870) | unbiased; falls as 1 / sqrt(N) |

Of top-k, log p_i errs by at most 2^-11 (|log p_i / p_1| + its mean under p) + 1e-6: fp16 keeps 11 bits, and probabilities are
normalized to one less the kept mass, which is exact in fp32. Ids take as many bits as the vocabulary needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.ensemble.targets import NONE, Dense, Heads, Sparse

NUMBERS = 2**21
"""Numbers in the probabilities of some tokens at a time."""
COUNT_BITS = 7


@dataclass(frozen=True)
class Hidden:
    """Hidden states, from which with the heads all logits follow."""

    name: ClassVar[str] = "hidden"
    dtype: str = "bf16"

    def encode(self, target: Dense, rows: Sequence[int]) -> list[bytes]:
        """One record for each row of a batch."""
        numbers = target.states.to(torch.bfloat16).view(torch.int16) if self.dtype == "bf16" else target.states.float()
        return [part.cpu().contiguous().numpy().tobytes() for part in numbers.chunk(len(rows))]

    def decode(self, records: Sequence[NDArray[np.uint8]], length: int, heads: Heads) -> Dense:
        """The target of these rows, end to end."""
        joined = torch.from_numpy(np.concatenate(records))
        numbers = joined.view(torch.bfloat16 if self.dtype == "bf16" else torch.float32)
        return Dense(numbers.view(len(records) * length, -1), heads)


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens and the mass of the others."""

    name: ClassVar[str] = "top-k"
    k: int = 64

    def encode(self, target: Dense, rows: Sequence[int]) -> list[bytes]:
        vocabulary = target.heads.vocabulary
        found: list[tuple[Tensor, ...]] = []
        for logits in _logits(target):
            total = logits.logsumexp(1)
            best, ids = logits.topk(self.k, dim=1)
            rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - total
            found.append((ids, (best - best[:, :1]).half(), rest.float()))
        ids, ratios, rest = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        bits = bits_of(vocabulary)
        return [
            pack(i.ravel(), bits).tobytes() + r.tobytes() + m.tobytes()
            for i, r, m in zip(*(np.split(part, len(rows)) for part in (ids, ratios, rest)), strict=True)
        ]

    def decode(self, records: Sequence[NDArray[np.uint8]], length: int, heads: Heads) -> Sparse:
        bits, count = bits_of(heads.vocabulary), length * self.k
        size = -(-count * bits // 8)
        ids = np.concatenate([unpack(one[:size], bits, count) for one in records]).reshape(-1, self.k)
        ratios = np.concatenate([one[size : size + 2 * count].view(np.float16) for one in records]).reshape(-1, self.k)
        rest = np.concatenate([one[size + 2 * count :].view(np.float32) for one in records]).astype(np.float64)
        powers = np.exp(ratios.astype(np.float64))
        probabilities = powers * (-np.expm1(rest) / powers.sum(1))[:, None]
        return Sparse(torch.from_numpy(ids), torch.from_numpy(probabilities), torch.from_numpy(rest))


@dataclass(frozen=True)
class Sampled:
    """Counts of draws. The draws of a row follow from the seed and the row alone."""

    name: ClassVar[str] = "sampled"
    draws: int = 50
    seed: int = 0

    def encode(self, target: Dense, rows: Sequence[int]) -> list[bytes]:
        length = len(target.states) // len(rows)
        keys = [np.random.Philox(key=np.array([self.seed, row], np.uint64)) for row in rows]
        uniform = np.concatenate([np.random.Generator(key).random((length, self.draws)) for key in keys])
        drawn, start = [], 0
        for logits in _logits(target):
            sums = logits.double().softmax(1).cumsum(1)
            u = torch.from_numpy(uniform[start : start + len(logits)]).to(sums.device) * sums[:, -1:]
            ids = torch.searchsorted(sums, u, right=True).clamp_(max=target.heads.vocabulary - 1)
            drawn.append(ids.sort(1).values)
            start += len(logits)
        bits = bits_of(target.heads.vocabulary)
        return [_counted(part, bits) for part in np.split(torch.cat(drawn).cpu().numpy(), len(rows))]

    def decode(self, records: Sequence[NDArray[np.uint8]], length: int, heads: Heads) -> Sparse:
        bits = bits_of(heads.vocabulary)
        width = item_bytes(bits)
        distinct = np.concatenate([one[:length] for one in records]).astype(np.int64)
        items = np.zeros((int(distinct.sum()), 8), np.uint8)
        items[:, :width] = np.concatenate([one[length:] for one in records]).reshape(-1, width)
        values = items.view("<u8")[:, 0].astype(np.int64)
        rows = np.repeat(np.arange(len(distinct)), distinct)
        slots = np.arange(len(values)) - np.repeat(np.cumsum(distinct) - distinct, distinct)
        ids = np.full((len(distinct), int(distinct.max())), NONE, np.int64)
        probabilities = np.zeros(ids.shape)
        ids[rows, slots] = values & ((1 << bits) - 1)
        probabilities[rows, slots] = ((values >> bits) + 1) / self.draws
        return Sparse(
            torch.from_numpy(ids), torch.from_numpy(probabilities),
            torch.full((len(ids),), -torch.inf, dtype=torch.float64),
        )  # fmt: skip


Form = Hidden | TopK | Sampled
FORMS: dict[str, type[Form]] = {form.name: form for form in (Hidden, TopK, Sampled)}


def of_json(facts: dict[str, Any]) -> Form:
    """The form that `to_json` told."""
    return FORMS[facts["name"]](**{key: value for key, value in facts.items() if key != "name"})


def to_json(form: Form) -> dict[str, Any]:
    """A form as JSON values."""
    return {"name": form.name, **vars(form)}


def bits_of(vocabulary: int) -> int:
    """Bits of an id."""
    return max(1, (vocabulary - 1).bit_length())


def item_bytes(bits: int) -> int:
    """Bytes of an id and its count."""
    return -(-(bits + COUNT_BITS) // 8)


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Numbers below 2^bits, end to end."""
    places = np.arange(bits, dtype=np.int64)
    return np.packbits(((values[:, None] >> places) & 1).astype(np.uint8))


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """The numbers that `pack` took."""
    digits = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    found: NDArray[np.int64] = digits.astype(np.int64) @ (np.int64(1) << np.arange(bits, dtype=np.int64))
    return found


def _logits(target: Dense) -> Any:
    """Whole logits, of a few tokens at a time, the same few for the same batch."""
    vocabulary = target.heads.vocabulary
    tokens = max(1, NUMBERS // vocabulary)
    for start in range(0, len(target.states), tokens):
        yield target.some(start, start + tokens, vocabulary).block(0, vocabulary)


def _counted(ids: NDArray[np.int64], bits: int) -> bytes:
    """Distinct ids of every token (length, draws), sorted, with their counts: how many there are, then all of them."""
    new = np.ones(ids.shape, bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = np.flatnonzero(new)
    counts = np.diff(np.append(begins, ids.size))
    values = (ids.ravel()[begins] | ((counts - 1) << bits)).astype("<u8")
    items = values.view(np.uint8).reshape(-1, 8)[:, : item_bytes(bits)]
    return new.sum(1).astype(np.uint8).tobytes() + items.tobytes()
