"""The loss against a teacher: its blocks against whole logits in float64, and what must hold of any such loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.memory import Count
from tests.models import batch, tiny
from trainer.ensemble import divergence, forms
from trainer.ensemble.divergence import Mix, mixed_loss
from trainer.ensemble.targets import NONE, Dense, Heads, Sparse
from trainer.model.loss import MASKED, cross_entropy, losses
from trainer.outcome import RunError

REAL, PADDED, WIDTH, TOKENS = 21, 24, 6, 17
TARGETS = torch.randint(0, REAL, (TOKENS,), generator=torch.Generator().manual_seed(1))
TARGETS[[0, 5]] = MASKED


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def teacher(members: int = 3, rule: bool = False, dtype: torch.dtype = torch.float64, bias: bool = True) -> Dense:
    width = members * WIDTH
    biases = normal(PADDED, members, seed=3, dtype=dtype) if bias else None
    return Dense(
        normal(TOKENS, width, seed=4, dtype=dtype),
        Heads(normal(PADDED, width, seed=5, dtype=dtype), biases, members, REAL, rule),
    )


def member_logits(target: Dense) -> torch.Tensor:
    """(members, tokens, columns), whole, in float64."""
    heads = target.heads
    parts = zip(
        target.states.double().chunk(heads.members, 1), heads.matrix.double().chunk(heads.members, 1), strict=True
    )
    whole = torch.stack([h @ w.T for h, w in parts])
    return whole if heads.biases is None else whole + heads.biases.double().T[:, None]


def distribution(target: Dense, temperature: float = 1.0) -> torch.Tensor:
    """(tokens, REAL): that of the teacher; padded columns are masked before anything is averaged."""
    whole = member_logits(target)[..., :REAL]
    logits = whole.softmax(-1).mean(0).log() if target.heads.probability_mean else whole.mean(0)
    return (logits / temperature).softmax(-1)


def student(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[torch.Tensor, nn.Linear]:
    head = nn.Linear(WIDTH, PADDED, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(normal(PADDED, WIDTH, seed=6))
        if bias:
            head.bias.copy_(normal(PADDED, seed=7))
    return normal(TOKENS, WIDTH, seed=8, dtype=dtype).requires_grad_(), head


def plain(hidden, head, p: torch.Tensor, alpha: float, temperature: float = 1.0):
    """The loss of whole logits, and its parts."""
    logits = head(hidden)
    q = (logits[:, :REAL] / temperature).log_softmax(-1)
    kept = TARGETS != MASKED
    kl = (torch.xlogy(p, p) - p * q)[kept].sum()
    entropy = cross_entropy(logits, TARGETS)
    return (1 - alpha) * entropy + alpha * temperature**2 * kl, entropy, kl


def gradients(loss, hidden, head) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


def mix(alpha: float, temperature: float = 1.0, tokens: int = 7, columns: int = 9, keep: bool = True) -> Mix:
    return Mix(alpha, temperature, REAL, tokens, columns, keep)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rule", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_blocks_give_the_loss_and_gradients_of_whole_logits_in_float64(dtype, bound, rule, temperature) -> None:
    hidden, head = student()
    p = distribution(teacher(rule=rule), temperature)
    expected, entropy, kl = plain(hidden, head, p, 0.7, temperature)
    exact = gradients(expected, hidden, head)
    for tokens, columns, keep in ((5, 4, True), (1, 1, False), (17, 24, True), (7, 21, False)):
        some, own = student(dtype)
        target = teacher(rule=rule, dtype=dtype)
        loss = mixed_loss(some, TARGETS, own, target, mix(0.7, temperature, tokens, columns, keep))
        assert loss.dtype == dtype
        assert abs(loss.detach().item() - expected.item()) <= bound * abs(expected.item())
        assert target.parts.tolist() == pytest.approx([entropy.item(), kl.item()], rel=bound)
        for found, true in zip(gradients(3 * loss, some, own), exact, strict=True):
            assert (found.double() - 3 * true).abs().max() <= 10 * bound * 3 * true.abs().max()


def test_padded_columns_have_no_probability_and_what_a_teacher_says_there_changes_nothing() -> None:
    hidden, head = student()
    target, other = teacher(), teacher()
    other.heads.matrix[REAL:] = 100.0
    found = [mixed_loss(hidden, TARGETS, head, one, mix(1.0)) for one in (target, other)]
    assert found[0].item() == found[1].item()
    by_head = gradients(found[0], hidden, head)[1]
    assert by_head[REAL:].abs().max() == 0.0
    wrong = Mix(1.0, 1.0, PADDED, 5, 4)  # negative control: padded columns taken for tokens
    wide = Dense(target.states, Heads(target.heads.matrix, target.heads.biases, 3, PADDED, False))
    assert abs((mixed_loss(hidden, TARGETS, head, wide, wrong) - found[0]).item()) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("members", [1, 3])
def test_a_teacher_that_is_the_student_is_at_distance_zero_with_no_gradient(members, temperature) -> None:
    hidden, head = student(torch.float32, bias=False)
    heads = Heads(head.weight.detach().repeat(1, members), None, members, REAL, False)
    target = Dense(hidden.detach().repeat(1, members), heads)
    loss = mixed_loss(hidden, TARGETS, head, target, mix(1.0, temperature))
    bound = 0.0 if members == 1 else 1e-5
    assert abs(loss.item()) <= bound
    assert all(g.abs().max() <= bound for g in gradients(loss, hidden, head))
    head.weight.data[3] += 0.1  # negative control
    assert mixed_loss(hidden, TARGETS, head, target, mix(1.0, temperature)).item() > 1e-3


def test_a_teacher_that_is_sure_is_the_text() -> None:
    hidden, head = student()
    ids = TARGETS.clamp_min(0)[:, None]
    one_hot = Sparse(ids, torch.ones(TOKENS, 1, dtype=torch.float64), torch.full((TOKENS,), -torch.inf))
    q = head(hidden)[:, :REAL]
    expected = cross_entropy(q, TARGETS)
    loss = mixed_loss(hidden, TARGETS, head, one_hot, mix(1.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, true in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert (found - true).abs().max() <= 1e-12


def test_alpha_0_is_the_cross_entropy_of_all_columns() -> None:
    hidden, head = student()
    expected = cross_entropy(head(hidden), TARGETS)
    loss = mixed_loss(hidden, TARGETS, head, teacher(), mix(0.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, true in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert (found - true).abs().max() <= 1e-12


def test_the_gradient_by_logits_is_q_less_p_by_finite_differences() -> None:
    """With the identity as head, hidden states are logits."""
    p = distribution(teacher())
    logits = normal(TOKENS, PADDED, seed=9).requires_grad_()
    identity = nn.Linear(PADDED, PADDED, bias=False, dtype=torch.float64)
    nn.init.eye_(identity.weight)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return mixed_loss(z, TARGETS, identity, teacher(), mix(1.0))

    (found,) = torch.autograd.grad(loss(logits), [logits])
    expected = torch.zeros_like(found)
    kept = TARGETS != MASKED
    expected[kept, :REAL] = (logits[:, :REAL].softmax(-1) - p)[kept]
    assert (found - expected).abs().max() <= 1e-12
    for token, column in ((1, 0), (2, 20), (16, 7), (5, 3), (4, 22)):
        step = torch.zeros_like(logits)
        step[token, column] = 1e-5
        slope = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert slope.item() == pytest.approx(float(found[token, column]), abs=1e-8)


def top(p: torch.Tensor, k: int) -> Sparse:
    """The exact k likeliest and the mass of the rest."""
    best, ids = p.topk(k, dim=1)
    rest = p.scatter(1, ids, 0.0).sum(1)
    return Sparse(ids, best, rest.log())


@pytest.mark.parametrize("columns", [4, 24])
def test_all_tokens_of_top_k_are_the_whole_distribution(columns) -> None:
    hidden, head = student()
    dense = mixed_loss(hidden, TARGETS, head, teacher(), mix(0.7, columns=columns))
    sparse = mixed_loss(
        hidden, TARGETS, head, top(distribution(teacher()), REAL), mix(0.7, columns=columns, keep=False)
    )
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-12)
    for found, true in zip(gradients(sparse, hidden, head), gradients(dense, hidden, head), strict=True):
        assert (found - true).abs().max() <= 1e-12


@pytest.mark.parametrize("columns", [4, 24])
def test_top_k_normalizes_both_sides_over_the_whole_vocabulary(columns) -> None:
    """KL over k tokens and one bucket for the rest, in float64; and k of a student that is the teacher give 0."""
    hidden, head = student()
    p = distribution(teacher())
    target = top(p, 5)
    q = head(hidden)[:, :REAL].softmax(-1)
    inside = q.gather(1, target.ids)
    kl = (target.probabilities * (target.probabilities / inside).log()).sum(1)
    rest, ours = target.rest.exp(), 1 - inside.sum(1)
    expected = (kl + rest * (rest / ours).log())[TARGETS != MASKED].sum()
    loss = mixed_loss(hidden, TARGETS, head, target, mix(1.0, columns=columns))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, true in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert (found - true).abs().max() <= 1e-12
    mine = mixed_loss(hidden, TARGETS, head, top(q.detach(), 5), mix(1.0, columns=columns))
    assert abs(mine.item()) <= 1e-12
    assert all(g.abs().max() <= 1e-12 for g in gradients(mine, hidden, head))
    # Negative control: the teacher normalized over its k tokens, the student over all, is no distance.
    kept = Sparse(
        target.ids, target.probabilities / target.probabilities.sum(1, keepdim=True), torch.full((TOKENS,), -torch.inf)
    )
    assert abs(mixed_loss(hidden, TARGETS, head, kept, mix(1.0)).item() - expected.item()) > 1e-2


# The forms of a cache, on a vocabulary without padding.


def encoded(form, target: Dense, rows: int = 1) -> Dense | Sparse:
    records = [np.frombuffer(one, np.uint8) for one in form.encode(target, list(range(rows)))]
    return form.decode(records, len(target.states) // rows, target.heads)


def test_hidden_states_come_back_as_they_were_rounded() -> None:
    target = teacher(dtype=torch.float32)
    assert torch.equal(encoded(forms.Hidden("fp32"), target).states, target.states)
    assert torch.equal(encoded(forms.Hidden("bf16"), target).states, target.states.bfloat16())


@pytest.mark.parametrize("k", [1, 5, REAL])
def test_top_k_comes_back_within_its_bound_and_its_rest_exactly(k) -> None:
    target = teacher(dtype=torch.float32, bias=False)
    p = distribution(target)
    found, exact = encoded(forms.TopK(k), target), top(p, k)
    assert torch.equal(found.ids, exact.ids)
    logs = exact.probabilities.log()
    ratios = (logs - logs[:, :1]).abs()
    mean = (ratios * exact.probabilities).sum(1, keepdim=True) / exact.probabilities.sum(1, keepdim=True)
    assert ((found.probabilities.log() - logs).abs() <= 2**-11 * (ratios + mean) + 1e-5).all()
    assert (found.probabilities.sum(1) + found.rest.exp() - 1).abs().max() <= 1e-12
    if k < REAL:
        assert (found.rest - exact.rest).abs().max() <= 1e-5
    else:
        assert (found.rest == -torch.inf).all()


def test_ids_take_as_many_bits_as_the_vocabulary_needs() -> None:
    for vocabulary in (2, 300, 128_256):
        ids = np.random.default_rng(0).integers(0, vocabulary, 1001)
        packed = forms.pack(ids, forms.bits_of(vocabulary))
        assert len(packed) == -(-1001 * forms.bits_of(vocabulary) // 8)
        assert np.array_equal(forms.unpack(packed, forms.bits_of(vocabulary), 1001), ids)
    assert (forms.bits_of(128_256), forms.item_bytes(17)) == (17, 3)


def test_sampled_targets_are_counts_of_the_teachers_draws_and_do_not_depend_on_the_batch() -> None:
    target = teacher(dtype=torch.float32)
    form = forms.Sampled(draws=50, seed=3)
    found = encoded(form, target)
    assert found.probabilities.sum(1).tolist() == pytest.approx([1.0] * TOKENS, abs=1e-12)
    assert all(len({i for i in row if i != NONE}) == sum(i != NONE for i in row) for row in found.ids.tolist())
    parts = [Dense(target.states[i : i + 1], target.heads) for i in range(TOKENS)]
    together = form.encode(target, list(range(TOKENS)))  # 17 rows of one token
    assert together == [form.encode(part, [row])[0] for row, part in enumerate(parts)]
    assert together != forms.Sampled(draws=50, seed=4).encode(target, list(range(TOKENS)))


def test_the_gradient_of_sampled_targets_tends_to_the_whole_one_as_one_over_the_root_of_draws() -> None:
    hidden, head = student(torch.float64, bias=False)
    target = teacher(dtype=torch.float32)
    dense = teacher()
    exact = gradients(mixed_loss(hidden, TARGETS, head, dense, mix(1.0)), hidden, head)[0]

    def error(count: int, repeats: int, start: int) -> float:
        """Root mean square error of the mean gradient over `count` caches of 20 draws."""
        squares = []
        for repeat in range(repeats):
            total = torch.zeros_like(exact)
            for seed in range(count):
                sampled = encoded(forms.Sampled(draws=20, seed=start + repeat * count + seed), target)
                total += gradients(mixed_loss(hidden, TARGETS, head, sampled, mix(1.0, 1.0, 17, 24)), hidden, head)[0]
            squares.append(float((total / count - exact).square().mean()))
        return math.sqrt(sum(squares) / repeats)

    few, many = error(1, 30, 0), error(9, 6, 1000)
    assert few / many == pytest.approx(3.0, rel=0.3)
    biased = [top(distribution(dense), 2)]  # negative control: what top-k without its rest tends to
    biased[0].rest.fill_(-torch.inf)
    biased[0].probabilities /= biased[0].probabilities.sum(1, keepdim=True)
    off = gradients(mixed_loss(hidden, TARGETS, head, biased[0], mix(1.0)), hidden, head)[0] - exact
    assert math.sqrt(float(off.square().mean())) > 3 * many


# On a model.


def taught(model, alpha: float, target) -> tuple[float, dict[str, torch.Tensor]]:
    inputs, targets = batch(3, 16)
    model.zero_grad()
    loss, objective = losses(model, inputs, targets, against=target)
    objective.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "llama, tied", "opt, tied", "mixtral"])
def test_a_model_learns_as_from_whole_logits(name) -> None:
    model = tiny(name).double().eval()
    model.set_experts_implementation("eager")
    inputs, targets = batch(3, 16)
    states, matrix = normal(48, 12, seed=1), normal(301, 12, seed=2)
    model.zero_grad()
    logits = model(input_ids=inputs, use_cache=False)
    p = (states @ matrix.T).softmax(-1)
    q = logits.logits.flatten(0, 1).log_softmax(-1)
    kl = (torch.xlogy(p, p) - p * q)[targets.flatten() != MASKED].sum()
    objective = 0.4 * cross_entropy(logits.logits, targets) + 0.6 * kl
    if name == "mixtral":
        objective = objective + model.config.router_aux_loss_coef * 43 * logits.aux_loss
    objective.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    divergence.install(model, 0.6, 1.0, 301)
    target = Dense(states, Heads(matrix, None, 1, 301, False))
    _, found = taught(model, 0.6, target)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max().clamp_min(1e-2), key
    assert target.parts[1].item() == pytest.approx(kl.item(), rel=1e-10)


def test_peak_of_living_bytes_is_below_a_third_at_a_vocabulary_of_32k() -> None:
    vocabulary, tokens = 32768, 256
    states, matrix = normal(tokens, 64, dtype=torch.float32), normal(vocabulary, 64, seed=1, dtype=torch.float32)
    inputs, targets = batch(2, tokens // 2, vocabulary)
    model = tiny("llama", vocabulary=vocabulary, length=tokens // 2)
    with Count() as whole:
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        q, p = logits.log_softmax(-1), (states @ matrix.T).log_softmax(-1)
        kl = nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        (0.1 * nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") + 0.9 * kl).backward()
    del logits, q, p, kl
    divergence.install(model, 0.9, 1.0, vocabulary)
    model.zero_grad()
    with Count() as blocks:
        losses(model, inputs, targets, against=Dense(states, Heads(matrix, None, 1, vocabulary, False)))[1].backward()
    assert whole.largest == 4 * tokens * vocabulary
    assert blocks.largest <= 4 * 64 * vocabulary
    assert blocks.peak <= 0.3 * whole.peak


def test_soft_capped_logits_are_refused() -> None:
    from trainer.ensemble.states import check_linear

    model = tiny("gemma2, tied")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    with pytest.raises(RunError, match="gemma2 changes what its linear head gives"):
        check_linear(model, model, torch.device("cpu"))
    plain = tiny("llama")
    check_linear(plain, plain, torch.device("cpu"))
