"""Mixtures: shares exact at every prefix, counts and seeks that agree with a walk, sources apart, one tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_data_order import FakeSplit
from tests.unit.test_data_prepare import WORDS, corpus, quiet
from trainer.__main__ import main
from trainer.config import DataConfig, TokenizerConfig
from trainer.config_data import MixtureSource, check_data, weights_of
from trainer.data import open_data, prepare
from trainer.data.batches import Batches
from trainer.data.mixture import Schedule
from trainer.data.order import permute
from trainer.data.sources import summary
from trainer.data.stream import Part, Stream, Subset
from trainer.outcome import RunError
from trainer.yaml_source import Source


@st.composite
def weights(draw) -> list[Fraction]:
    """Up to eight weights with the sum 1 and a common denominator up to 600."""
    counts = draw(st.lists(st.integers(1, 75), min_size=1, max_size=8))
    return [Fraction(count, sum(counts)) for count in counts]


@settings(max_examples=80, deadline=None)
@given(weights())
def test_every_prefix_has_each_share_to_less_than_one_sequence(shares) -> None:
    schedule = Schedule(shares)
    turns = schedule.at(np.arange(2 * schedule.period + 7))[0].tolist()
    counts = [0] * len(shares)
    for place, source in enumerate(turns, start=1):
        counts[source] += 1
        assert all(abs(count - share * place) < 1 for count, share in zip(counts, shares, strict=True))
        if place % schedule.period == 0:
            assert counts == [share * place for share in shares]


def test_hard_shares_stay_exact() -> None:
    """Greedy rules (the largest deficit, the highest quotient) miss one of these by more than a sequence."""
    for counts in ([97, 1, 1, 1], [1] * 30 + [970], [500, 250, 125, 63, 31, 16, 15], [331, 331, 338]):
        schedule = Schedule([Fraction(count, sum(counts)) for count in counts])
        taken = np.zeros((len(counts), schedule.period + 1), np.int64)
        turns, _ = schedule.at(np.arange(schedule.period))
        for source in range(len(counts)):
            taken[source, 1:] = np.cumsum(turns == source)
        ideal = np.arange(schedule.period + 1) * np.array(counts)[:, None]
        assert np.abs(taken * schedule.period - ideal).max() < schedule.period


@settings(max_examples=60, deadline=None)
@given(weights(), st.integers(0, 10**12), st.integers(0, 900))
def test_a_seek_agrees_with_a_walk(shares, start, count) -> None:
    schedule = Schedule(shares)
    sources, indices = schedule.at(np.arange(start, start + count))
    for source in range(len(shares)):
        mine = indices[sources == source]
        before = schedule.taken(source, start)
        assert mine.tolist() == list(range(before, before + len(mine)))
        assert schedule.taken(source, start + count) == before + len(mine)
        for index in mine[:3].tolist():
            assert sources[schedule.position_of(source, index) - start] == source
            assert schedule.taken(source, schedule.position_of(source, index)) == index


def test_the_largest_schedule_is_made_in_a_moment() -> None:
    schedule = Schedule([Fraction(1, 3) + Fraction(1, 10**6) - Fraction(1, 3 * 10**6) * 3, Fraction(2, 3)])
    assert schedule.at(np.array([10**17]))[1][0] > 0
    with pytest.raises(ValueError, match="sum 1"):
        Schedule([Fraction(1, 2)])


def three(order_seed=5, epoch_order="reshuffle") -> Stream:
    """Sources of 40, 9 and 20 sequences; tokens tell source and row."""
    parts = {
        name: Part(FakeSplit(n), Fraction(w)) for name, n, w in (("a", 40, "1/2"), ("b", 9, "1/3"), ("c", 20, "1/6"))
    }
    return Stream(parts, order_seed, epoch_order)


def test_each_source_gives_every_sequence_once_per_pass_and_passes_are_counted() -> None:
    stream = three()
    sources, ids = stream.ids(np.arange(480))
    assert stream.epochs(480) == {"a": 240 / 40, "b": 160 / 9, "c": 80 / 20}
    for index, n in enumerate((40, 9, 20)):
        mine = ids[sources == index]
        for start in range(0, len(mine) - n + 1, n):
            assert sorted(mine[start : start + n].tolist()) == list(range(n))
        assert mine[:n].tolist() != mine[n : 2 * n].tolist()
    repeated = three(epoch_order="repeat").ids(np.arange(480))[1]
    assert repeated[sources == 1][:9].tolist() == repeated[sources == 1][9:18].tolist()


def test_ends_of_passes_and_of_data() -> None:
    stream = three()
    sources, _ = stream.ids(np.arange(1000))
    for passes, name, index, n in ((1, "a", 0, 40), (2.5, "a", 0, 40), (1, "b", 1, 9), (7, "c", 2, 20)):
        end = stream.after_epochs(passes, name)
        assert (sources[:end] == index).sum() == passes * n
        assert sources[end - 1] == index
    position, name = stream.first_exhausted(3)
    assert name == "b"  # the smallest source for its weight
    assert (sources[:position] == 1).sum() == 27
    assert sources[position] == 1
    assert all(count <= 3 for count in stream.epochs(position).values())


def test_sources_of_one_size_have_orders_of_their_own_that_follow_the_seed() -> None:
    def orders(seed):
        stream = Stream({name: Part(FakeSplit(50), Fraction(1, 2)) for name in "ab"}, seed)
        sources, ids = stream.ids(np.arange(100))
        return [ids[sources == index].tolist() for index in range(2)]

    first, second = orders(1), orders(2)
    assert first == orders(1)
    assert first[0] != first[1]
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_a_batch_of_a_mixture_is_the_same_on_any_number_of_ranks(count) -> None:
    expected = [tokens.tolist() for tokens in three().rows(np.arange(73, 73 + count))[0]]
    sizes = int(three().bytes(np.arange(73, 73 + count)).sum())
    for world, rows, micro_steps in [(1, 30, 1), (2, 5, 3), (3, 2, 5), (5, 3, 2)]:
        seen = {}
        for rank in range(world):
            batches = Batches(three(), rank, world, rows, micro_steps)
            assert batches.bytes(73, count) == sizes
            for j, batch in enumerate(batches.at(73, count)):
                for i in range(rows):
                    if int(batch.targets[i, 0]) != -100:
                        seen[(j * world + rank) * rows + i] = [*batch.inputs[i].tolist(), int(batch.targets[i, -1])]
        assert [seen[place] for place in sorted(seen)] == expected


def test_subsets_are_exact_nested_and_independent_of_the_order() -> None:
    table = FakeSplit(1000)
    chosen = [set(Subset(table, count, 3).ids(np.arange(count)).tolist()) for count in (10, 200, 999, 1000)]
    assert [len(ids) for ids in chosen] == [10, 200, 999, 1000]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert chosen[1] != set(Subset(table, 200, 4).ids(np.arange(200)).tolist())
    for order_seed in (0, 1):
        stream = Stream({"data": Part(Subset(table, 200, 3), Fraction(1))}, order_seed)
        tokens, _ = stream.rows(np.arange(400))
        assert set((tokens[:200, 0] // 10).tolist()) == chosen[1] == set((tokens[200:, 0] // 10).tolist())
    # The choice is not the order: a pass over the whole table does not begin with the subset.
    assert set(permute(np.arange(200), 1000, (3, 0)).tolist()) != chosen[1]


def mixture(tmp_path, **changes) -> DataConfig:
    """Two text sources of different kinds and sizes."""
    if not (tmp_path / "a").exists():
        corpus(tmp_path / "a", 120)
        lines = [json.dumps({"text": " ".join(np.random.default_rng(i).choice(WORDS, 40))}) for i in range(60)]
        (tmp_path / "b.jsonl").write_text("\n".join(lines))
    given = {
        "mixture": {
            "a": MixtureSource(path=str(tmp_path / "a"), weight=0.7, validation_fraction=0.3),
            "b": MixtureSource(path=str(tmp_path / "b.jsonl"), weight="3/10", validation_fraction=0.3),
        },
        "folder": str(tmp_path / "prepared"),
        "tokenizer": TokenizerConfig(vocab_size=300),
        "sequence_length": 16,
    }
    return DataConfig(**(given | changes))


def test_each_source_has_its_table_and_all_have_one_tokenizer(tmp_path) -> None:
    said = []
    settings = mixture(tmp_path)
    folders = prepare(settings, said.append)
    assert [folder.name.partition("-")[0] for folder in folders.values()] == ["a", "b"]
    assert sum("trained a byte-level BPE" in line for line in said) == 1
    assert {line.partition(":")[0] for line in said if "prepared" in line} == {"a", "b"}
    data = open_data(folders, settings)
    assert len({table.facts["tokenizer_digest"] for table in data.tables.values()}) == 1
    assert weights_of(settings) == data.weights == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    tokens, sizes = data.train.rows(np.arange(30))
    sources, ids = data.train.ids(np.arange(30))
    for row, size, source, index in zip(tokens, sizes, sources, ids, strict=True):
        expected, bytes_ = data.tables["ab"[source]].train.rows(np.array([index]))
        assert row.tolist() == expected[0].tolist()
        assert size == bytes_[0]
    before = [f.stat().st_mtime_ns for folder in folders.values() for f in folder.iterdir()]
    said.clear()
    assert prepare(settings, said.append) == folders
    assert not said
    assert [f.stat().st_mtime_ns for folder in folders.values() for f in folder.iterdir()] == before
    # Another weight is another mixture of the same tables.
    other = {
        name: replace(one, weight=w)
        for (name, one), w in zip(settings.mixture.items(), (0.5, 0.5), strict=True)
    }  # fmt: skip
    assert prepare(replace(settings, mixture=other), quiet) == folders


def test_prepare_shows_what_it_made(tmp_path, monkeypatch, capsys) -> None:
    corpus(tmp_path / "a", 120)
    (tmp_path / "run.yaml").write_text(
        f"""
name: r
model: {{config: {{model_type: llama}}}}
data:
  mixture:
    a: {{path: {tmp_path}/a, weight: 3/4, validation_fraction: 0.3}}
    lib: {{path: {tmp_path}/a/000*.txt, weight: 0.25, validation_fraction: 0.3, subset_tokens: 32}}
  folder: {tmp_path}/prepared
  tokenizer: {{vocab_size: 300}}
  sequence_length: 16
train: {{length: 5 steps, tokens_per_step: 64}}
optim: {{name: normuon, lr: 0.01}}
parallel: {{name: single}}
"""
    )
    monkeypatch.setattr("sys.argv", ["trainer", "prepare", str(tmp_path / "run.yaml"), "--seed=3"])
    assert main() == 0
    said = capsys.readouterr().out
    assert f"a: {tmp_path}/prepared/a-" in said
    assert "3/4 of the sequences" in said
    assert "2 sequences (a subset of" in said
    assert "tokenizer: 300 tokens" in said
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr("sys.argv", ["trainer", "prepare", str(tmp_path / "run.yaml"), "--data.folder=/proc/none"])
    assert main() == 78
    assert "the data folder cannot be written" in capsys.readouterr().err


def test_the_baseline_of_a_mixture_is_mixed_as_its_tokens_are(tmp_path) -> None:
    settings = mixture(tmp_path)
    data = open_data(prepare(settings, quiet), settings)
    bits, bytes_ = 0.0, 0.0
    for name, weight in (("a", 0.7), ("b", 0.3)):
        facts = data.tables[name].facts
        held = facts["splits"]["validation"]
        bits += weight * facts["unigram_bits_per_byte"] * held["bytes"] / held["tokens"]
        bytes_ += weight * held["bytes"] / held["tokens"]
    assert data.unigram_bits_per_byte == pytest.approx(bits / bytes_, rel=1e-12)


def test_a_source_of_weight_0_is_validated_on_and_never_trained_on(tmp_path) -> None:
    settings = mixture(tmp_path)
    sources = {name: replace(one, weight=w) for (name, one), w in zip(settings.mixture.items(), (0, 1), strict=True)}
    folders = prepare(settings, quiet)
    only = replace(settings, mixture=sources)
    data = open_data(folders, only)
    alone = Stream({"b": Part(data.tables["b"].train, Fraction(1))}, settings.order_seed)
    assert data.train.rows(np.arange(200))[0].tolist() == alone.rows(np.arange(200))[0].tolist()
    assert data.train.epochs(200).keys() == {"b"}
    assert (list(data.validation), data.measured) == (["a", "b"], {"a": 0, "b": 1})
    assert summary(data)[0][1].startswith("validated on only; 0 sequences of 16 tokens")
    # Where nothing that is trained on has validation text, all that is measured counts alike.
    assert replace(data, validation={"a": data.validation["a"]}).measured == {"a": 1}
    for wrong, what in (
        ({"a": replace(sources["a"], subset_tokens=16)}, "does nothing at weight 0"),
        ({}, "epochs of b"),
    ):
        source = Source({}, str(tmp_path / "run.yaml"))
        with pytest.raises(RunError) as error:
            check_data(replace(only, mixture={**sources, **wrong}), "3 epochs of a", source)
        assert what in error.value.what + error.value.mend


def test_tables_of_different_tokenizers_are_refused(tmp_path) -> None:
    settings = mixture(tmp_path)
    folders = prepare(settings, quiet)
    (tmp_path / "c.txt").write_text("quite another text\n" * 300)
    alone = DataConfig(
        path=str(tmp_path / "c.txt"), documents="line", validation_fraction=0.5, folder=settings.folder,
        tokenizer=TokenizerConfig(vocab_size=259), sequence_length=16,
    )  # fmt: skip
    (tmp_path / "c.txt").write_text("\n".join(f"line {i} of a text" for i in range(200)))
    other = prepare(alone, quiet)["data"]
    tables = {
        "a": MixtureSource(table=str(folders["a"]), weight="1/2"),
        "c": MixtureSource(table=str(other), weight="1/2"),
    }
    given = replace(settings, mixture=tables)
    with pytest.raises(RunError, match="tables of a and c were made with different tokenizers"):
        open_data(prepare(given, quiet), given)
    good = replace(settings, mixture={n: MixtureSource(table=str(f), weight="1/2") for n, f in folders.items()})
    assert open_data(prepare(good, quiet), good).train.schedule.period == 2


def test_subset_tokens_are_whole_sequences_of_the_table(tmp_path) -> None:
    settings = mixture(tmp_path)
    folders = prepare(settings, quiet)
    there = open_data(folders, settings).tables["a"].train.sequences

    def opened(tokens):
        part = replace(settings.mixture["a"], subset_tokens=tokens)
        return open_data(folders, replace(settings, mixture=settings.mixture | {"a": part}))

    data = opened(64)
    assert data.train.sources[0].sequences == 4
    assert data.identity()["sources"]["a"]["subset"] == 4
    assert data.identity() != opened(80).identity()
    for tokens, words in ((70, "64 or 80"), (16 * (there + 1), f"at most {16 * there}")):
        with pytest.raises(RunError) as caught:
            opened(tokens)
        assert "data.mixture.a.subset_tokens" in caught.value.what
        assert words in caught.value.mend
