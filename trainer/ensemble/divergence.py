"""(1 - alpha) CE + alpha T^2 KL(teacher || student) in blocks of tokens and vocabulary: of neither model a tensor of tokens x
vocabulary exists, forward or backward.

KL(p || q) = E_p[y - z] / T - log sum exp(y / T) + log sum exp(z / T) for logits y and z (Hinton et al. 2015, arXiv
1503.02531, equations 2 to 4). A first pass over blocks of columns accumulates both log-sum-exps and the expectation online,
in fp32 or wider; a second turns the same blocks into the gradient by the student's logits, T (q - p), and at once into
those of its hidden states and head, which are all that is kept for the backward.

The teacher has the student's inputs, positions and masks. The divergence is over the tokenizer's vocabulary: padded columns
of a teacher get no probability. The cross-entropy is over all columns, as in a run without a teacher. Masked targets count in
neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.ensemble.targets import Dense, Logits, Sparse, borders
from trainer.model import chunked
from trainer.model.loss import MASKED

NUMBERS = {"cpu": (2**22, 2**18), "cuda": (2**25, 2**25)}
"""Numbers in the logits of some tokens, and in one block of their columns."""
FEWEST = 64
"""Tokens, where the vocabulary is large."""

Gradients = Iterator[tuple[int, int, Tensor]]
"""(first, last, gradient by the student's logits of these columns (tokens, last - first)); used up at once."""


@dataclass(frozen=True)
class Mix:
    """How teacher and text are mixed, and in what blocks.

    Args:
        vocabulary: columns that are tokens.
        tokens, columns: sides of a block; the result does not depend on them but by rounding.
        keep: whether the blocks of some tokens wait for the second pass, or are made twice.
    """

    alpha: float
    temperature: float
    vocabulary: int
    tokens: int
    columns: int
    keep: bool = True


def mix_of(
    alpha: float, temperature: float, vocabulary: int, padded: int, device: torch.device, chunk: int | None
) -> Mix:
    """The blocks for a device; `chunk`, if given, is their number of tokens."""
    most, block = NUMBERS["cuda" if device.type == "cuda" else "cpu"]
    tokens = chunk or max(FEWEST, most // padded)
    return Mix(alpha, temperature, vocabulary, tokens, max(1, block // tokens), tokens * padded <= 4 * most)


def install(model: Any, alpha: float, temperature: float, vocabulary: int) -> None:
    """Make `model(..., targets=..., against=Dense or Sparse)` return (summed mixed loss, balancing loss or None).

    Cross-entropy and divergence, summed, are left in `against.parts`. Without `against` the model answers as before.
    `train.loss_chunk`, where it is set, is the number of tokens of a block. The architecture's logits must be head
    times hidden states (`states.check_linear`).
    """
    decoder, own = chunked.decoder_of(model), model.forward

    def forward(*arguments: Any, against: Dense | Sparse | None = None, **options: Any) -> Any:
        if against is None:
            return own(*arguments, **options)
        targets = options.pop("targets")
        found = chunked.decoded(own, decoder, arguments, options)
        assert found is not None
        hidden, _, balance = found
        head = model.get_output_embeddings()
        mix = mix_of(
            alpha, temperature, vocabulary, head.weight.shape[0], hidden.device, getattr(model, "loss_chunk", None)
        )
        return mixed_loss(hidden, targets, head, against, mix), balance

    model.forward = forward


def mixed_loss(hidden: Tensor, targets: Tensor, head: nn.Linear, against: Dense | Sparse, mix: Mix) -> Tensor:
    """The summed loss, in nats; its parts are left in `against.parts`.

    Args:
        hidden: (..., d) of the student; targets: (...), `MASKED` where nothing is predicted.
        head: of the student, with gathered weights.
        against: of as many tokens.
    """
    total: Tensor = _Mixed.apply(
        mix, against, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), head.weight, head.bias
    )
    return total


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mix: Mix,
        against: Dense | Sparse,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        device = hidden.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        by_hidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        by_weight = torch.zeros_like(weight, dtype=wide)
        by_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        parts = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix, states = weight.to(precision), hidden.to(precision)
            for start in range(0, len(hidden), mix.tokens):
                stop = min(start + mix.tokens, len(hidden))
                student, wanted = Student(states[start:stop], matrix, bias), targets[start:stop]
                teacher = against.some(start, stop, mix.columns)
                work = _dense if isinstance(teacher, Logits) else _sparse
                entropy, divergence, gradients = work(student, teacher, wanted, mix)  # type: ignore[arg-type]
                kept = wanted != MASKED
                parts += torch.stack([entropy.double(), divergence.double()]).masked_fill(~kept, 0.0).sum(1)
                slot = torch.zeros(len(wanted), hidden.shape[1], dtype=student.wide, device=hidden.device)
                for first, last, gradient in gradients:
                    gradient.mul_(kept[:, None])
                    narrow = gradient.to(precision)
                    slot += narrow @ matrix[first:last]
                    if precision == wide:
                        by_weight[first:last].addmm_(narrow.T, student.states)
                    else:
                        by_weight[first:last] += narrow.T @ student.states
                    if by_bias is not None:
                        by_bias[first:last] += gradient.sum(0)
                by_hidden[start:stop] = slot
        against.parts = parts.cpu()
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtype = weight.dtype
        weights = parts.new_tensor([1 - mix.alpha, mix.alpha * mix.temperature**2])
        return (parts @ weights).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        scaled = [None if g is None else g.mul_(outer[0]).to(ctx.dtype) for g in (by_weight, by_bias)]
        return None, None, by_hidden.mul_(outer[0]), None, *scaled


class Student:
    """The student's logits of a few tokens, block by block."""

    def __init__(self, states: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
        self.states, self.matrix, self.bias = states, matrix, bias
        self.wide = torch.promote_types(matrix.dtype, torch.float32)
        self.padded = len(matrix)

    def block(self, first: int, last: int) -> Tensor:
        """(tokens, last - first) in fp32 or wider."""
        found = F.linear(self.states, self.matrix[first:last]).to(self.wide)
        return found if self.bias is None else found.add_(self.bias[first:last])

    def column(self) -> Tensor:
        return torch.full((len(self.states),), -torch.inf, dtype=self.wide, device=self.states.device)


def _dense(student: Student, teacher: Logits, wanted: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Gradients]:
    """Cross-entropy and divergence (tokens,) against a teacher's logits, and the gradient of the mix."""
    heat, share = mix.temperature, mix.alpha
    every = list(borders(0, mix.vocabulary, mix.columns))

    def powers(first: int, last: int) -> tuple[Tensor, ...]:
        """exp of student's, student's at T, teacher's at T, each less their largest; these two; E[y - z] / T; log at y."""
        z, y = student.block(first, last), teacher.block(first, last)
        own = _own(z, wanted, first, last)
        gap = y - z
        most, top = z.amax(1), y.amax(1)
        e_z, e_y = z.sub_(most[:, None]), y.sub_(top[:, None])
        e_heat = e_z
        if heat != 1:
            gap.div_(heat)
            e_heat, e_y, top = (e_z / heat).exp_(), e_y.div_(heat), top / heat
        return e_z.exp_(), e_heat, e_y.exp_(), most, top, torch.linalg.vecdot(e_y, gap), own

    made: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    log_z, log_heat, log_y = student.column(), student.column(), student.column()
    own, gaps = torch.zeros_like(log_z), list[tuple[Tensor, Tensor]]()
    for border in every:
        e_z, e_heat, e_y, most, top, gap, picked = found = powers(*border)
        log_z = torch.logaddexp(log_z, e_z.sum(1).log_() + most)
        log_heat = log_z if heat == 1 else torch.logaddexp(log_heat, e_heat.sum(1).log_() + most / heat)
        log_y = torch.logaddexp(log_y, e_y.sum(1).log_() + top)
        own += picked
        gaps.append((gap, top))
        if mix.keep:
            made[border] = found
    divergence = log_heat - log_y
    for gap, top in gaps:
        divergence += gap * (top - log_y).exp()
    log_all = _with_padding(student, log_z, mix)

    def gradients() -> Gradients:
        for first, last in every:
            e_z, e_heat, e_y, most, top, *_ = made.pop((first, last), None) or powers(first, last)
            text = (1 - share) * (most - log_all).exp()
            # Products before the difference: what is equal cancels to the bit.
            e_y.mul_((share * heat * (top - log_y).exp())[:, None])
            if heat == 1:
                found = e_z.mul_((share * (most - log_heat).exp() + text)[:, None]).sub_(e_y)
            else:
                e_heat.mul_((share * heat * (most / heat - log_heat).exp())[:, None]).sub_(e_y)
                found = e_heat.addcmul_(e_z, text[:, None])
            yield first, last, _less_own(found, wanted, first, last, 1 - share)
        yield from _padding(student, log_all, wanted, mix)

    return log_all - own, divergence, gradients()


def _sparse(student: Student, teacher: Sparse, wanted: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Gradients]:
    """The same against some tokens and the mass of the rest: the rest of the student is one bucket, too."""
    share, ids = mix.alpha, teacher.ids
    p = teacher.probabilities.to(student.wide)
    every = list(borders(0, mix.vocabulary, mix.columns))

    def powers(first: int, last: int) -> tuple[Tensor, ...]:
        """exp of the student's logits less their largest, 0 at the teacher's tokens; the largest; which those are."""
        z = student.block(first, last)
        own = _own(z, wanted, first, last)
        rows, slots = ((ids >= first) & (ids < last)).nonzero(as_tuple=True)
        columns = ids[rows, slots] - first
        named, most = z[rows, columns], z.amax(1)
        e_z = z.sub_(most[:, None]).exp_()
        e_z[rows, columns] = 0.0
        return e_z, most, own, rows, slots, columns, named

    made: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    log_rest = student.column()
    own, named = torch.zeros_like(log_rest), torch.full_like(p, -torch.inf)
    for border in every:
        e_z, most, picked, rows, slots, _, values = found = powers(*border)
        log_rest = torch.logaddexp(log_rest, e_z.sum(1).log_() + most)
        named[rows, slots] = values
        own += picked
        if mix.keep:
            made[border] = found
    log_z = torch.logaddexp(log_rest, named.logsumexp(1))
    log_all = _with_padding(student, log_z, mix)
    bucket, rest = log_rest - log_z, teacher.rest.to(student.wide)
    mass = rest.exp()
    divergence = (torch.xlogy(p, p) - torch.where(p > 0, p * (named - log_z[:, None]), 0.0)).sum(1)
    divergence += torch.where(mass > 0, mass * (rest - bucket), 0.0)
    ratio = torch.where(mass > 0, (rest - bucket).exp(), 0.0)

    def gradients() -> Gradients:
        text = (1 - share) * (log_z - log_all).exp()
        for first, last in every:
            e_z, most, _, rows, slots, columns, values = made.pop((first, last), None) or powers(first, last)
            found = e_z.mul_(((most - log_z).exp() * (share * (1 - ratio) + text))[:, None])
            q = (values - log_z[rows]).exp()
            found[rows, columns] = q * (share + text[rows]) - share * p[rows, slots]
            yield first, last, _less_own(found, wanted, first, last, 1 - share)
        yield from _padding(student, log_all, wanted, mix)

    return log_all - own, divergence, gradients()


def _own(z: Tensor, wanted: Tensor, first: int, last: int) -> Tensor:
    """The logits (tokens,) of the targets in this block, 0 for those in another."""
    inside = (wanted >= first) & (wanted < last)
    return z.gather(1, (wanted - first).clamp(0, last - first - 1)[:, None])[:, 0].masked_fill(~inside, 0.0)


def _less_own(gradient: Tensor, wanted: Tensor, first: int, last: int, weight: float) -> Tensor:
    """Less the weight of the text at the targets."""
    inside = (wanted >= first) & (wanted < last)
    amount = inside.to(gradient.dtype).mul_(-weight)
    return gradient.scatter_add_(1, (wanted - first).clamp(0, last - first - 1)[:, None], amount[:, None])


def _with_padding(student: Student, log_z: Tensor, mix: Mix) -> Tensor:
    """Log-sum-exp over all columns, padded ones too."""
    for first, last in borders(mix.vocabulary, student.padded, mix.columns):
        log_z = torch.logaddexp(log_z, student.block(first, last).logsumexp(1))
    return log_z


def _padding(student: Student, log_all: Tensor, wanted: Tensor, mix: Mix) -> Gradients:
    """The text pushes padded columns down; the teacher says nothing about them."""
    for first, last in borders(mix.vocabulary, student.padded, mix.columns):
        found = student.block(first, last).sub_(log_all[:, None]).exp_().mul_(1 - mix.alpha)
        yield first, last, _less_own(found, wanted, first, last, 1 - mix.alpha)
