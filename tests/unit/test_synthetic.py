"""Synthetic text: decoding against whole forwards, draws against their distributions, statistics against counting by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from launch import distilling
from launch.cli import dispatch
from trainer import config as configuration
from trainer.data.masking import Borders, beginnings, crossing, position_ids
from trainer.data.mixture import Passes
from trainer.derive import derive
from trainer.ensemble import parts, synthetic_table, text_statistics
from trainer.ensemble.joint import Joint, combined
from trainer.ensemble.streams import decode, points, reserved
from trainer.evaluate.sampling import Sampling, continuations
from trainer.outcome import RunError

PLAIN = Sampling(temperature=1.0, top_p=1.0, seed=5)
CPU, V, L = torch.device("cpu"), 29, 24
SMALL = {
    "vocab_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": L,
    "initializer_range": 0.3,
}
LLAMA = LlamaConfig(**SMALL, hidden_size=16, intermediate_size=24, num_key_value_heads=1)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=L, initializer_range=0.3, bos_token_id=0, eos_token_id=1),
    "a window": MistralConfig(**SMALL, hidden_size=16, intermediate_size=24, num_key_value_heads=1, sliding_window=5),
}  # fmt: skip


def model(config=LLAMA, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def spoken(one, streams=range(6), length=L, sampling=PLAIN, *, apart=False, borders=Borders(0, 1)):
    return decode(one, streams, length, sampling, vocab_size=V, borders=borders, apart=apart, device=CPU)


@torch.no_grad()
def recomputed(one, found, *, apart=False, borders=Borders(0, 1)):
    """(rows, L, V) logits of one forward over whole rows, without a cache."""
    inputs = torch.from_numpy(found.tokens[:, :-1])
    more = {"position_ids": torch.from_numpy(position_ids(inputs.numpy(), borders))} if apart else {}
    logits = one(input_ids=inputs, use_cache=False, **more).logits[..., :V].double()
    if apart and borders.bos == borders.eos:  # nothing was learned of a border right behind a border
        logits[torch.from_numpy(beginnings(inputs.numpy(), borders)), borders.eos] = -torch.inf
    return logits


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("borders", [Borders(0, 1), Borders(None, 1), Borders(1, 1)])
def test_tokens_and_losses_are_those_of_a_full_recompute(name, apart, borders) -> None:
    one = model(CONFIGS[name])
    assert (reserved(one, L) is None) == (name == "a window")
    found = spoken(one, apart=apart, borders=borders)
    logs = recomputed(one, found, apart=apart, borders=borders).log_softmax(-1)
    counted = torch.ones(6, L, dtype=torch.bool)
    if apart:
        counted = torch.from_numpy(~crossing(found.tokens, borders))
        assert bool((found.tokens[:, 1:] == 1).any())  # documents end in the rows
    targets = torch.from_numpy(found.tokens[:, 1:])
    expected = -(logs.gather(2, targets[..., None])[..., 0] * counted).sum(1)
    np.testing.assert_allclose(found.losses, expected, atol=2e-5)
    np.testing.assert_allclose(found.entropies, (torch.special.entr(logs.exp()).sum(-1) * counted).sum(1), atol=2e-5)
    assert found.sampled.tolist() == counted.sum(1).tolist()
    drawn = torch.from_numpy(np.stack([points(5, stream, L) for stream in range(6)]))
    sums = logs.exp().cumsum(-1)
    again = torch.searchsorted(sums, drawn[..., None] * sums[..., -1:], right=True)[..., 0]
    assert torch.equal(again[counted], targets[counted])
    assert bool((targets < V).all())


def test_masked_documents_need_the_mask() -> None:
    """Negative control of the test above: what sees its row's other documents has other losses."""
    one = model()
    found = spoken(one, apart=True)
    logs = recomputed(one, found).log_softmax(-1)
    counted = torch.from_numpy(~crossing(found.tokens, Borders(0, 1)))
    seen = -(logs.gather(2, torch.from_numpy(found.tokens[:, 1:, None]))[..., 0] * counted).sum(1)
    assert float((seen - torch.from_numpy(found.losses)).abs().max()) > 1e-2


@pytest.mark.parametrize("rule", ["logit mean", "probability mean"])
def test_copies_of_a_member_say_what_it_says_and_others_do_not(rule) -> None:
    single = spoken(model())
    copies = spoken(Joint([model()] * 3, rule, V))
    assert np.array_equal(single.tokens, copies.tokens)
    np.testing.assert_allclose(copies.losses, single.losses, atol=1e-9)
    members = [model(), model(seed=1), model(seed=2)]
    mixed = spoken(Joint(members, rule, V))
    assert not np.array_equal(mixed.tokens, single.tokens)
    whole = combined([recomputed(member, mixed) for member in members], rule).log_softmax(-1)
    expected = -whole.gather(2, torch.from_numpy(mixed.tokens[:, 1:, None]))[..., 0].sum(1)
    np.testing.assert_allclose(mixed.losses, expected, atol=2e-5)


def test_the_rules_are_the_geometric_and_the_arithmetic_mean() -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    p = logits.softmax(-1)
    geometric = p.log().mean(0).exp()
    np.testing.assert_allclose(
        combined(list(logits), "logit mean").softmax(-1), geometric / geometric.sum(-1, keepdim=True)
    )
    np.testing.assert_allclose(combined(list(logits), "probability mean").softmax(-1), p.mean(0))


def test_temperature_zero_is_argmax_and_so_is_its_limit() -> None:
    one = model()
    greedy = spoken(one, sampling=Sampling(temperature=0.0, top_p=1.0))
    assert torch.equal(recomputed(one, greedy).argmax(-1), torch.from_numpy(greedy.tokens[:, 1:]))
    assert np.array_equal(greedy.tokens, spoken(one, sampling=Sampling(temperature=1e-4, top_p=1.0)).tokens)
    assert not np.array_equal(greedy.tokens, spoken(one).tokens)


def test_an_ensemble_continues_prompts_as_a_model_does() -> None:
    prompts = [[0, 4, 5], [0, 7], [0, 9, 9, 9]]  # of unequal length: padded from the left

    def told(one) -> list:
        return list(
            continuations(one, prompts, Sampling(tokens=9), seeds=[1, 2, 3], vocab_size=V, end=1, room=L, device=CPU)
        )

    assert told(Joint([model()] * 2, "logit mean", V)) == told(model())
    assert told(Joint([model(), model(seed=1)], "logit mean", V)) != told(model())


def test_a_stream_has_numbers_of_its_own_wherever_it_is_decoded() -> None:
    assert np.array_equal(spoken(model(), range(6)).tokens[2:], spoken(model(), range(2, 6)).tokens)  # up to last bits
    assert np.array_equal(points(0, 7, 9), points(0, 7, 20)[:9])
    every = np.concatenate([points(seed, stream, 500) for seed in (0, 1) for stream in range(20)])
    assert len(np.unique(every)) == len(every)
    assert 0 <= every.min() < 1e-3 < 1 - 1e-3 < every.max() < 1
    assert abs(every.mean() - 0.5) < 5 / np.sqrt(12 * len(every))


class Bigrams:
    """A "model" whose next token depends on the last one only."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.config = logits, LLAMA

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=past_key_values)

    __call__ = forward


def unlikely(tokens: np.ndarray, logits: torch.Tensor) -> float:
    """Probability of so large a chi-squared of the transitions, if they were drawn from the rows of `logits`."""
    p = logits.double().softmax(-1).numpy()
    counts = np.zeros_like(p)
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    expected = counts.sum(1, keepdims=True) * p
    freedom, found = p.shape[0] * (p.shape[1] - 1), ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(found / 2.0)))


def test_transitions_of_a_bigram_model_pass_chi_squared_and_their_loss_is_its_entropy() -> None:
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    found = spoken(Bigrams(logits), range(1000), 1000)  # a million draws
    assert unlikely(found.tokens, logits) > 1e-3
    assert unlikely(found.tokens, logits * 1.02) < 1e-6  # negative control: two percent colder
    figures = np.stack([found.losses, found.entropies, found.sampled], 1)
    told = synthetic_table.likelihood(figures)
    assert abs(told["teacher_loss"] - told["teacher_entropy"]) < 5 * told["teacher_loss_error"] < 0.01
    own = torch.special.entr(logits.double().softmax(-1)).sum(-1).numpy()
    assert told["teacher_entropy"] == pytest.approx(own[found.tokens[:, :-1]].mean(), abs=1e-9)
    cold = spoken(Bigrams(logits), range(50), 500, Sampling(temperature=0.5, top_p=1.0))
    assert cold.losses.sum() < 0.9 * cold.entropies.sum()  # the loss is that of temperature 1


def test_statistics_are_those_of_counting_by_hand() -> None:
    rows = np.random.default_rng(0).integers(2, 7, (30, 20))
    rows[:, 0] = 0
    rows[rows == 6] = 1
    for size in (1, 2, 3, 13):
        grams = [tuple(row[i : i + size]) for row in rows for i in range(len(row) - size + 1)]
        assert text_statistics.distinct(rows, size) == len(set(grams)) / len(grams)
    training = rows[::3].copy()
    training[:, :2] = 9
    known = {tuple(row[i : i + 4]) for row in training for i in range(17)}
    grams = [tuple(row[i : i + 4]) for row in rows for i in range(17)]
    share = sum(gram in known for gram in grams) / len(grams)
    assert text_statistics.copied([rows, training], iter([training[:3], training[3:]]), 4) == [share, 1.0]
    assert text_statistics.copied([rows], iter([]), 4) == [0.0]
    for bos, eos, row, lengths, cut in (
        (0, 1, [0, 5, 5, 1, 0, 1, 0, 5], [2, 0], 1), (None, 1, [1, 5, 5, 1, 5, 1], [2, 1], 0), (0, None, [0, 5, 0, 5, 5], [1], 1),
        (1, 1, [1, 5, 5, 1, 1, 5, 1], [2, 1], 0),
    ):  # fmt: skip
        found = text_statistics.lengths(np.array([row]), bos, eos)
        assert (found[0].tolist(), found[1]) == (lengths, cut)


def test_parts_hold_every_batch_once_and_batch_b_is_of_member_b_mod_k(monkeypatch) -> None:
    monkeypatch.setattr(parts, "PART_TOKENS", 2 * 4 * 16)
    for mode, members in (("pool", 3), ("joint", 3), ("a", 1)):
        made = SimpleNamespace(mode=mode, members=[None] * members, sequences=41, batch=4, sequence_length=16)
        found = parts.parts_of(made)
        assert sorted(batch for part in found for batch in part.batches) == list(range(11))
        assert all(len(part.batches) <= 2 for part in found)
        assert all(part.member == (batch % 3 if mode == "pool" else 0) for part in found for batch in part.batches)


CONFIG = """\
name: s
model: {{config: {{model_type: llama}}}}
data: {data}
train: {{length: {length}, tokens_per_step: 128}}
optim: {{name: adamw, lr: 0.01}}
parallel: {{name: fsdp2}}
"""


def config(
    tmp_path: Path, length: str, data: str = "{path: a.txt, sequence_length: 16, subset_tokens: 320, order_seed: 3}"
):
    (tmp_path / "s.yaml").write_text(CONFIG.format(length=length, data=data))
    return configuration.load(tmp_path / "s.yaml")


@pytest.mark.parametrize(("share", "epochs"), [("1/2", 3), ("0.75", 2), ("9/10", 4), ("0.3", 1)])
def test_real_text_is_passed_as_often_as_without_and_the_share_holds_at_every_prefix(tmp_path, share, epochs) -> None:
    w = distilling.share_of(share)
    student = distilling.student_of_text(config(tmp_path, f"{epochs} epochs"), Path("t"), w)
    real = student.data.mixture["real"]
    assert (real.path, real.subset_tokens, real.weight) == ("a.txt", 320, str(1 - w))
    assert (student.data.tokenizer.path, student.data.mixture["synthetic"].table) == ("t/tokenizer", "t")
    assert (student.data.order_seed, student.train.length) == (3, f"{epochs} epochs of real")
    passes = Passes(configuration_weights(student), {"real": 20, "synthetic": 33})
    derived = derive(student, 1, passes)
    base = 20 * epochs  # sequences
    assert abs(derived.sequences - base / (1 - w)) < 1 / (1 - w)
    positions = np.arange(derived.sequences)
    sources, nth = passes.schedule.at(positions)
    assert Counter((nth[sources == 0] % 20).tolist()) == dict.fromkeys(range(20), epochs)
    assert all(abs((sources[:p] == 1).sum() - w * p) < 1 for p in positions)


def configuration_weights(student) -> dict[str, Fraction]:
    from trainer.config_data import weights_of

    return weights_of(student.data)


def test_lengths_and_mixtures_of_a_student(tmp_path) -> None:
    for length, share, expected in (
        ("100 steps", "0.75", "400 steps"), ("100 steps", "0.3", "143 steps"), ("1k tokens", "1/2", "2000 tokens"),
    ):  # fmt: skip
        assert (
            distilling.student_of_text(config(tmp_path, length), Path("t"), distilling.share_of(share)).train.length
            == expected
        )
    two = "{mixture: {a: {path: a.txt, weight: 1/3}, b: {path: b.txt, weight: 2/3}}, sequence_length: 16}"
    student = distilling.student_of_text(config(tmp_path, "2 epochs of a", two), Path("t"), Fraction(1, 2))
    assert {name: one.weight for name, one in student.data.mixture.items()} == {
        "a": "1/6",
        "b": "1/3",
        "synthetic": "1/2",
    }
    assert student.train.length == "2 epochs of a"
    taken = "{mixture: {synthetic: {path: a.txt, weight: 1}}, sequence_length: 16}"
    with pytest.raises(RunError, match="source synthetic already"):
        distilling.student_of_text(config(tmp_path, "2 steps", taken), Path("t"), Fraction(1, 2))


@pytest.mark.parametrize("length", ["3 epochs", "1 epochs", "7 steps", "100 steps", "1k tokens"])
@pytest.mark.parametrize("share", ["3/4", "1/10", "0.35", "9/10"])
def test_synthetic_text_alone_takes_as_many_steps_as_the_mixture_and_keeps_real_text_to_validate_on(
    length, share, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(distilling, "_size", lambda teacher, runs, name: 20)
    plain, w = config(tmp_path, length), distilling.share_of(share)
    mixed = distilling.student_of_text(plain, Path("t"), w)
    alone = distilling.without_real_text(mixed, distilling.needed_tokens(plain, None, tmp_path, w, alone=True))
    assert configuration_weights(alone) == {"real": 0, "synthetic": 1}
    sizes = {"real": 20, "synthetic": 33}
    steps = [derive(one, 1, Passes(configuration_weights(one), sizes)).steps for one in (mixed, alone)]
    assert steps[0] == steps[1]
    assert (alone.data.mixture["real"].path, alone.data.mixture["real"].subset_tokens) == ("a.txt", None)
    assert replace(alone, data=mixed.data, train=mixed.train) == mixed


@pytest.mark.parametrize("share", ["1", "0", "-0.5", "1.5", "half", "1/1"])
def test_a_share_without_real_or_without_synthetic_text_is_refused(share, tmp_path) -> None:
    with pytest.raises(RunError, match="above 0 and below 1"):
        dispatch(["distill", "text", str(tmp_path / "none.yaml"), "--teacher=e", f"--share={share}"])


def test_an_unknown_teacher_is_refused(tmp_path) -> None:
    with pytest.raises(RunError, match="no ensemble and no run nobody"):
        dispatch(["ensemble", "sample", "nobody", "--tokens=1k", f"--runs={tmp_path}"])
