"""Losses of ensembles against float64 of whole logits, which subsets are taken, curves, and what is refused."""

from __future__ import annotations

import math
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional

from launch.cli import dispatch
from tests.models import ARCHITECTURES, batch, tiny
from tests.unit.test_chunked_loss import large
from tests.unit.test_pipeline import backend  # noqa: F401
from trainer.checkpoint import manifest as manifests
from trainer.data.batches import MicroBatch
from trainer.ensemble import curve, manifest
from trainer.ensemble.prediction import FLOATS, chunks, subset_losses
from trainer.ensemble.states import hidden_states
from trainer.ensemble.subsets import choose
from trainer.files import sha256_file, write_json
from trainer.model.loss import MASKED
from trainer.outcome import RunError
from trainer.parallel import single

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS = 23, 19


class Dense:
    """A member in memory."""

    def __init__(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.states, self.weight, self.bias = states, weight, bias

    def hidden(self, start: int, stop: int) -> torch.Tensor:
        return self.states[start:stop]

    def head(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight[start:stop], None if self.bias is None else self.bias[start:stop]

    def logits(self) -> torch.Tensor:
        bias = 0.0 if self.bias is None else self.bias.double()
        return self.states.double() @ self.weight.double().T + bias


def team(count: int, columns: int = VOCABULARY, bias: bool = True) -> list[Dense]:
    draw = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return [Dense(normal(TOKENS, 6), normal(columns, 6), normal(columns) if bias else None) for _ in range(count)]


TARGETS = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))
TARGETS[[3, 8]] = MASKED


def reference(members: list[Dense], subset: tuple[int, ...], rule: int) -> torch.Tensor:
    """-log p(y) from whole logits in float64."""
    logits = torch.stack([members[k].logits()[:, :VOCABULARY] for k in subset])
    logs = logits.mean(0).log_softmax(-1) if rule == 0 else logits.softmax(-1).mean(0).log()
    return -logs.gather(1, TARGETS.clamp_min(0)[:, None])[:, 0].masked_fill(TARGETS == MASKED, 0.0)


def found(members: list[Dense], subsets: list[tuple[int, ...]], tokens: int = 5, columns: int = 7) -> torch.Tensor:
    return subset_losses(members, TARGETS, subsets, VOCABULARY, tokens=tokens, columns=columns)


@pytest.mark.parametrize("columns", [1, 7, VOCABULARY])
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_all_subsets_by_both_rules_are_those_of_whole_logits(tokens, columns) -> None:
    members, subsets = team(4), choose(4, 31, 0)
    assert len(subsets) == 15
    losses = found(members, subsets, tokens, columns)
    for rule in (0, 1):
        for index, subset in enumerate(subsets):
            assert (losses[rule, index] - reference(members, subset, rule)).abs().max() < 2e-6, (rule, subset)
    assert (losses[0, 4:] - losses[1, 4:]).abs().max() > 1e-2, "the rules are two"


def test_logit_mean_is_one_model_with_a_concatenated_head() -> None:
    """mean_k W_k h_k = [W_1 .. W_K] / K . [h_1; ..; h_K]."""
    members = team(3, bias=False)
    joint = Dense(torch.cat([m.states for m in members], 1), torch.cat([m.weight for m in members], 1) / 3)
    whole = found(members, [(0, 1, 2)])[0, 0]
    assert (whole - found([joint], [(0,)])[0, 0]).abs().max() < 2e-6


def test_copies_are_their_member_and_order_does_not_matter() -> None:
    members = team(3)
    single = found(members, [(0,)])
    copies = found([members[0]] * 3, [(0, 1, 2)])
    assert (copies - single).abs().max() < 1e-6
    assert (found(members, [(0, 1, 2)]) - found(members[::-1], [(0, 1, 2)])).abs().max() < 1e-6
    assert (found(members, [(0, 1, 2)]) - single).abs().max() > 1e-2


def test_an_ensemble_is_never_worse_than_the_mean_of_its_members_at_any_token() -> None:
    members, subsets = team(4), choose(4, 31, 0)
    losses = found(members, subsets)
    for index, subset in enumerate(subsets):
        bound = losses[0, list(subset)].mean(0)
        assert bool((losses[:, index] <= bound + 1e-6).all()), subset
    assert bool((losses[:, -1] < losses[0, :4].mean(0) - 1e-3).any())


def test_constants_and_padded_columns_change_nothing() -> None:
    members = team(3)
    plain = found(members, [(0, 1, 2), (0, 2)])
    shifted = []
    for k, member in enumerate(members):  # a feature per position that every column weighs alike
        shift = 5.0 * torch.sin(torch.arange(TOKENS) + k)[:, None]
        shifted.append(
            Dense(
                torch.cat([member.states, shift], 1),
                torch.cat([member.weight, torch.ones(VOCABULARY, 1)], 1),
                member.bias,
            )
        )
    assert (found(shifted, [(0, 1, 2), (0, 2)]) - plain).abs().max() < 5e-6
    padded = [
        Dense(
            m.states, torch.cat([m.weight, torch.full((9, 6), 3.0)]), torch.cat([m.bias, torch.full((9,), 8.0)])  # type: ignore[list-item]
        )
        for m in members
    ]  # fmt: skip
    assert torch.equal(found(padded, [(0, 1, 2), (0, 2)]), plain)
    forbidden = [
        Dense(m.states, m.weight, m.bias.index_fill(0, torch.tensor([4, 5, 6]), -torch.inf))  # type: ignore[union-attr]
        for m in members
    ]
    for columns in (1, 7):  # blocks that hold nothing but padding
        losses = found(forbidden, [(0, 1)], columns=columns)[0, 0]
        kept = ~torch.isin(TARGETS, torch.tensor([4, 5, 6, MASKED]))
        assert (losses - reference(forbidden, (0, 1), 0)).abs()[kept].max() < 2e-6


def test_a_block_of_logits_does_not_grow_with_members() -> None:
    for members in (1, 2, 8, 32):
        for width in (24, 768, 4096):
            tokens, columns = chunks(members, width)
            assert members * tokens * columns <= FLOATS
            assert members * max(tokens, columns) * width <= 2 * FLOATS
    assert chunks(8, 768)[0] >= 256


def test_subsets_are_all_or_singles_chain_and_a_seeded_sample() -> None:
    assert choose(1, 31, 0) == [(0,)]
    assert choose(5, 31, 0) == [s for size in range(1, 6) for s in combinations(range(5), size)]
    some = choose(8, 31, 0)
    assert len(some) == len(set(some)) <= 31
    assert {(k,) for k in range(8)} | {tuple(range(k)) for k in range(1, 9)} <= set(some)
    assert {size: sum(len(s) == size for s in some) for size in (2, 7)} == {2: 3, 7: 3}
    assert choose(8, 31, 0) == some
    assert choose(8, 31, 1) != some
    assert len(choose(8, 1, 0)) == 15
    assert len(choose(8, 254, 0)) <= 254
    assert all(n <= comb(8, k) for k, n in [(k, sum(len(s) == k for s in choose(8, 254, 0))) for k in range(1, 9)])


REFUSED = ("gemma2, tied", "cohere, tied")  # soft-capped, scaled


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_head_of_an_architecture_give_its_own_logits_or_are_refused(name, tmp_path) -> None:
    device = torch.device("cpu")
    inputs, targets = batch(3, 16)
    members, logits = [], []
    for seed in (0, 1):
        model = large(tiny(name, seed=seed))
        strategy = single.Strategy(single.Options(), "fp32", device, 1)
        strategy.connect(model, None)
        if name in REFUSED:
            with pytest.raises(RunError, match="changes what its linear head gives"):
                hidden_states(model, strategy, [MicroBatch(inputs, targets, None)], tmp_path, device)
            return
        portions = [MicroBatch(i, t, None) for i, t in zip(inputs.split(1), targets.split(1), strict=True)]
        members.append(hidden_states(model, strategy, portions, tmp_path, device))
        with torch.no_grad():
            logits.append(model(input_ids=inputs, use_cache=False).logits.double())
    losses = subset_losses(members, targets.flatten(), [(0, 1)], 301, tokens=7, columns=50)
    for rule, logs in enumerate(
        (torch.stack(logits).mean(0).log_softmax(-1), torch.stack(logits).softmax(-1).mean(0).log())
    ):
        expected = functional.nll_loss(logs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=MASKED)
        assert (losses[rule, 0] - expected).abs().max() < 2e-5
    assert not list(tmp_path.iterdir())


# Curves.


def sources(extra: float = 0.0) -> list[curve.Source]:
    """Single losses with a large part in common, and a pair that is lower by 0.1 a token."""
    draw = np.random.default_rng(0)
    common, tokens = draw.normal(30, 8, 400), np.full(400, 10.0)
    losses = np.stack([common + draw.normal(0, extra, 400), common, common - 1.0])
    return [curve.Source(1.0, losses, tokens)]


SUBSETS = [(0,), (1,), (0, 1)]


def points(texts: list[curve.Source]) -> list[dict]:
    return curve.curve(SUBSETS, curve.losses(texts), curve.resampled(texts, 1000, 0))


def test_differences_are_paired_over_sequences() -> None:
    one, two = points(sources())
    assert (one["subsets"], two["of"]) == (2, 1)
    assert two["gain"] == pytest.approx(0.1)
    assert two["gain_interval"] == pytest.approx([0.1, 0.1], abs=1e-9)
    error = sources()[0].losses[0].std() / 10 / math.sqrt(400)
    assert np.diff(one["interval"])[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert two["step"] == two["gain"]
    _, noisy = points(sources(extra=2.0))
    width = np.diff(noisy["gain_interval"])[0]  # half of the noise of one single, and nothing of what is common
    assert width == pytest.approx(2 * 1.96 * 0.5 * 0.2 / math.sqrt(400), rel=0.15)
    assert noisy["gain_interval"][0] > 0


def test_text_twice_is_the_same_text_and_sources_count_by_weight() -> None:
    text = sources(2.0)[0]
    twice = curve.Source(1.0, np.tile(text.losses, 2), np.tile(text.tokens, 2))
    assert curve.losses([twice]) == pytest.approx(curve.losses([text]), rel=1e-12)
    halves = [curve.Source(0.25, text.losses, text.tokens), curve.Source(0.75, 2 * text.losses, text.tokens)]
    assert curve.losses(halves) == pytest.approx(1.75 * curve.losses([text]), rel=1e-12)
    assert curve.resampled(halves, 50, 0).mean(0) == pytest.approx(curve.losses(halves), rel=0.02)


def test_excess_of_members_with_independent_noise_falls_as_one_over_k() -> None:
    """z_k = z + noise: the closed form of why members help. Fails if members are not averaged before the softmax."""
    draw = torch.Generator().manual_seed(1)
    tokens, targets = 6000, None
    true = torch.randn(tokens, VOCABULARY, generator=draw, dtype=torch.float64)
    targets = true.softmax(-1).multinomial(1, generator=draw)[:, 0]
    noise = 0.3 * torch.randn(6, tokens, VOCABULARY, generator=draw, dtype=torch.float64)
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    members = [Dense(true + one, identity) for one in noise]
    subsets = [(k,) for k in range(6)] + [(0, 1), (2, 3), (4, 5), (0, 1, 2), (3, 4, 5), tuple(range(6))]
    losses = subset_losses(
        [*members, Dense(true, identity)], targets, [*subsets, (6,)], VOCABULARY, tokens=999, columns=9
    )
    excess = (losses[0] - losses[0, -1]).mean(1)
    sizes = np.array([1, 2, 3, 6])
    means = [float(excess[[i for i, s in enumerate(subsets) if len(s) == size]].mean()) for size in sizes]
    assert -np.polyfit(np.log(sizes), np.log(means), 1)[0] == pytest.approx(1.0, abs=0.1)


# Manifests.


def run(runs: Path, name: str, seed: int, **changes) -> None:
    """A run folder with a checkpoint, as far as a manifest looks at it."""
    folder = runs / name
    generation = folder / "checkpoints" / manifests.name(7)
    generation.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    vocabulary = {str(i): i for i in range(changes.get("words", 10))}
    (folder / "tokenizer").mkdir()
    write_json(
        folder / "tokenizer/tokenizer.json", {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "0"}]}
    )
    value = changes.get("value", seed)
    save_file(
        {"model.w": np.full((2, 2), value, np.float32), "optim.m": np.full(2, seed, np.float32)},
        generation / "a.safetensors",
    )
    size = (generation / "a.safetensors").stat().st_size
    manifests.write(
        generation,
        manifests.Manifest(
            step=7, position=70, world_size=1, tensors={},
            files={"a.safetensors": {"size": size, "sha256": sha256_file(generation / "a.safetensors")}},
            config={"seed": seed, "data": {"order_seed": seed}},
            state={
                "data": {"tokenizer": changes.get("tokenizer", "t"), "sources": {"data": changes.get("subset", 0)}},
                "architecture": {"vocab_size": changes.get("padded", 16), "layers": changes.get("layers", 2)},
            },
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "u"}, "members a and b have different tokenizers"),
        ({"words": 11}, r"different vocabularies \(10 and 11\)"),
        ({"padded": 32}, r"different padded vocabularies \(16 and 32\)"),
        ({"layers": 3}, "different architectures"),
        ({"subset": 1}, "different training subsets"),
        ({"seed": 0, "value": 5}, r"have the same seeds \(seed 0, data.order_seed 0\)"),
        ({"value": 0}, "a and b have equal weights: they are one model"),
    ],
)
def test_members_that_are_no_ensemble_are_refused_with_one_sentence(tmp_path, changes, words) -> None:
    run(tmp_path, "a", 0)
    run(tmp_path, "b", changes.pop("seed", 1), **changes)
    with pytest.raises(RunError, match=words) as error:
        dispatch(["ensemble", "make", "e", "a", "b", f"--runs={tmp_path}"])
    assert error.value.outcome.code == 78
    assert not (tmp_path / "ensembles").exists()


def test_missing_and_corrupt_members_no_member_and_a_name_that_is_taken_are_refused(tmp_path, capsys) -> None:
    for k, name in enumerate("abc"):
        run(tmp_path, name, k)
    assert dispatch(["ensemble", "make", "e", "a", "b", f"--runs={tmp_path}"]) == 0
    assert "logit mean of 2" in capsys.readouterr().out
    made = manifest.read(tmp_path, "e")
    assert (made.vocab_size, made.padded_vocab_size, made.members[1].seed) == (10, 16, 1)
    assert [path.name for path, _ in manifest.open_members(tmp_path, made)] == ["step-00000007"] * 2
    assert dispatch(["ensemble", "make", "e", "a", "b", "c", f"--runs={tmp_path}"]) == 0, "one that grows"
    stored = tmp_path / "b/checkpoints/step-00000007/a.safetensors"
    content = stored.read_bytes()
    for arguments, words in (
        (["make", "e", "a", "c"], "there is another ensemble e already: logit mean of a, b, c"),
        (["make", "f"], "an ensemble needs one member at least"),
        (["make", "f", "a", "d"], "member d is missing"),
        (["make", "f", "a", "a"], "members a, named twice, have the same seeds"),
        (["make", "../f", "a"], "is no name of an ensemble"),
        (["evaluate", "f"], "there is no ensemble f"),
    ):
        with pytest.raises(RunError, match=words) as error:
            dispatch(["ensemble", *arguments, f"--runs={tmp_path}"])
        assert error.value.outcome.code == 78
    stored.write_bytes(content[:-1] + b"\x01")
    for work in (
        lambda: manifest.open_members(tmp_path, made),
        lambda: manifest.make("f", tmp_path, "ab", "logit mean"),
    ):
        with pytest.raises(
            RunError, match="member b is corrupt: step-00000007: a.safetensors: expected sha256"
        ) as error:
            work()
        assert error.value.outcome.code == 78
    stored.write_bytes(content)
    manifests.write(stored.parent, manifests.Manifest(**vars(manifests.read(stored.parent)) | {"position": 80}))
    with pytest.raises(RunError, match="member b has another step-00000007 than the ensemble was made of"):
        manifest.open_members(tmp_path, made)
    (tmp_path / "ensembles/e/ensemble.json").write_text('{"format": 1}')
    with pytest.raises(RunError, match="the ensemble cannot be read"):
        manifest.read(tmp_path, "e")


# Training, with runs that end by themselves.


def test_members_differ_in_both_seeds_and_the_same_command_goes_on(tmp_path, backend, monkeypatch, capsys) -> None:  # noqa: F811
    from launch import pipeline
    from launch.verbs import ensemble

    monkeypatch.setenv("ORTHOGON_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.01)
    made: list[list[str]] = []
    monkeypatch.setattr(ensemble, "made", lambda name, runs, members, rule: made.append([name, *members]))
    config = ["ensemble", "train", str(ROOT / "configs/quickstart.yaml"), "--name=e", f"--runs={tmp_path}", "--seed=5"]
    with pytest.raises(RunError, match="--members is 0") as error:
        dispatch([*config, "--members=0"])
    assert error.value.outcome.code == 78
    assert dispatch([*config, "--members=2", "--dry-run"]) == 0
    assert f"run {tmp_path}/e-1: seed 6, data.order_seed 1" in capsys.readouterr().out
    assert not (tmp_path / "e-0").exists()
    assert dispatch([*config, "--members=2"]) == 0
    assert (made, backend["most"]) == ([["e", "e-0", "e-1"]], 1)
    from trainer import runfolder

    seeds = [
        (c.seed, c.data.order_seed, c.data.subset_seed)
        for c in (runfolder.open_run(tmp_path / f"e-{k}") for k in (0, 1))
    ]
    assert seeds == [(5, 0, 0), (6, 1, 0)]
    assert dispatch([*config, "--members=3", "--at-once=2"]) == 0
    assert backend["started"] == ["e-0", "e-1", "e-2"]
    assert "e-1: done before" in capsys.readouterr().out
    assert made[-1] == ["e", "e-0", "e-1", "e-2"]
