"""Order, packing, splitting, restart: the same tokens in the same order, whoever asks."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import DataConfig, TokenizerConfig
from trainer.data import open_table, verify
from trainer.data.batches import Batches
from trainer.data.corpus import documents
from trainer.data.order import permute, sequence_ids
from trainer.data.pack import bytes_per_token
from trainer.data.tokenizer import load_tokenizer, train_bpe
from trainer.outcome import RunError

preparation = importlib.import_module("trainer.data.prepare")  # the package offers its function under this name
TEXTS = [f"Straße {i}: der Zug fährt über die Brücke, 橋 {i * i}; and again the train runs on." for i in range(60)]


def config(folder: Path, **changes) -> DataConfig:
    source = folder / "corpus.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, *TEXTS[:5]]))
    base = DataConfig(
        path=str(source), folder=str(folder / "prepared"), validation_fraction=0.2,
        tokenizer=TokenizerConfig(vocab_size=300), sequence_length=16,
    )  # fmt: skip
    return replace(base, **changes)


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_the_order_of_an_epoch_is_a_permutation(n, seed, epoch) -> None:
    assert sorted(permute(np.arange(n), n, (seed, epoch))) == list(range(n))


def test_orders_differ_between_epochs_and_seeds_and_are_well_mixed() -> None:
    n = 1000
    a, b, c = (permute(np.arange(n), n, key) for key in ((0, 0), (0, 1), (1, 0)))
    for other in (b, c):
        assert (a == other).mean() < 0.02
    assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 0.1
    counts = {}
    for seed in range(6000):  # all orders of three come up, about equally often
        key = tuple(permute(np.arange(3), 3, (seed, 0)))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())


@settings(deadline=None)
@given(n=st.integers(1, 50), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_cutting_of_the_stream_gives_the_same_ids(n, cuts, seed) -> None:
    whole = sequence_ids(0, sum(cuts), n, seed)
    position, pieces = 0, []
    for cut in cuts:
        pieces.append(sequence_ids(position, cut, n, seed))
        position += cut
    assert np.array_equal(np.concatenate(pieces), whole)
    assert sorted(whole[:n]) == list(range(n))[: len(whole[:n])] or len(whole) < n


class FakeSplit:
    sequences = 37

    def rows(self, ids):
        return np.repeat(ids[:, None] + 1, 5, axis=1), ids


@pytest.mark.parametrize("count", [1, 7, 24])
def test_the_ranks_together_read_each_sequence_of_a_step_once(count) -> None:
    expected = sorted(sequence_ids(11, count, 37, 5) + 1)
    for world in (1, 2, 3, 5):
        for rows, micro_steps in ((8, -(-24 // (8 * world))), (3, -(-24 // (3 * world)))):
            seen = []
            for rank in range(world):
                batches = Batches(FakeSplit(), 5, rank, world, rows, micro_steps).at(11, count)
                assert len(batches) == micro_steps
                for inputs, targets in batches:
                    assert inputs.shape == targets.shape == (rows, 4)
                    real = (targets != -100).all(dim=1)
                    assert (targets[~real] == -100).all()
                    seen += inputs[real][:, 0].tolist()
            assert sorted(seen) == expected
    assert Batches(FakeSplit(), 5, 0, 1, 8, 3).bytes(11, count) == sum(expected) - count


def test_rows_decode_to_the_documents_and_count_their_bytes(tmp_path) -> None:
    here = config(tmp_path)
    folder = preparation.prepare(here, lambda text: None)
    verify(folder)
    table = open_table(folder, here)
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows, sizes = table.train.rows(np.arange(table.train.sequences))
    assert (rows[1:, 0] == rows[:-1, -1]).all()  # neighbours overlap by one
    stream = np.concatenate([rows[0], *rows[1:, 1:]])
    expected = [document.text for split, document in preparation._split(here) if split == "train"]
    text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
    joined = "".join(f"<|bos|>{document}<|eos|>" for document in expected)
    assert joined.encode().startswith(text.rstrip("\ufffd").encode())
    plain = text.replace("<|bos|>", "").replace("<|eos|>", "")
    assert abs(int(sizes.sum()) - len(plain.encode())) <= 8  # a character may be cut at the end
    assert sum(s["documents"] for s in table.facts["splits"].values()) == 65
    assert table.facts["unigram_bits_per_byte"] > 1
    assert preparation.prepare(here, pytest.fail) == folder  # found again, nothing said


@given(st.text(max_size=40), st.data())
def test_bytes_per_token_add_up(text, data) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    offsets = [(0, end) for end in ends]
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return
    assert bytes_per_token(text, offsets).sum() == (size if offsets else 0)


def test_equal_documents_fall_on_one_side(tmp_path) -> None:
    sides: dict[str, set[str]] = {}
    for split, document in preparation._split(config(tmp_path)):
        sides.setdefault(document.text, set()).add(split)
    assert {len(side) for side in sides.values()} == {1}
    assert set.union(*sides.values()) == {"train", "validation"}


def test_validation_text_is_kept_out_of_training(tmp_path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    split = list(preparation._split(config(tmp_path, validation_path=str(held))))
    train = {document.text for where, document in split if where == "train"}
    assert len(train) == 57
    assert not train & set(TEXTS[:3])


def test_a_killed_preparation_goes_on_and_gives_the_same_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "PART_BYTES", 1500)
    calm = preparation.prepare(replace(config(tmp_path), folder=str(tmp_path / "calm")), lambda text: None)
    made: list[str] = []
    make = preparation._make_part

    def counted(entries, tokenizer, path, say):
        if len(made) == 2 and not (tmp_path / "restarted").exists():
            raise KeyboardInterrupt
        make(entries, tokenizer, path, lambda text: made.append(text))

    monkeypatch.setattr(preparation, "_make_part", counted)
    here = config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(here, lambda text: None)
    (tmp_path / "restarted").touch()
    folder = preparation.prepare(here, lambda text: None)
    assert sum("is there already" in text for text in made) == 2
    assert (
        json.loads((folder / "table.json").read_text())["splits"]
        == json.loads((calm / "table.json").read_text())["splits"]
    )
    assert not list(folder.glob("part-*"))


def test_bpe_training_is_deterministic(tmp_path) -> None:
    for name in ("a", "b"):
        train_bpe(iter(TEXTS * 3), 320, tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_a_flipped_byte_is_found_and_named(tmp_path) -> None:
    folder = preparation.prepare(config(tmp_path), lambda text: None)
    path = folder / "train.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"train\.arrow"):
        verify(folder)


def test_another_tokenizer_length_or_vocabulary_than_the_tables_is_refused(tmp_path) -> None:
    here = config(tmp_path)
    folder = preparation.prepare(here, lambda text: None)
    with pytest.raises(RunError, match="the run wants 8"):
        open_table(folder, replace(here, sequence_length=8))
    train_bpe(iter(TEXTS), 280, tmp_path / "other")
    with pytest.raises(RunError, match="another tokenizer"):
        open_table(folder, replace(here, tokenizer=TokenizerConfig(path=str(tmp_path / "other"))))
    facts = json.loads((folder / "table.json").read_text())
    facts["splits"]["train"]["max_token"] = facts["vocab_size"]
    (folder / "table.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="beyond the vocabulary"):
        open_table(folder, here)
    with pytest.raises(RunError, match="no token table"):
        open_table(tmp_path, here)


def test_a_given_tokenizer_is_used_as_it_is(tmp_path) -> None:
    train_bpe(iter(TEXTS), 290, tmp_path / "mine")
    here = config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "mine")))
    table = open_table(preparation.prepare(here, lambda text: None), here)
    assert table.facts["vocab_size"] == 290


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (None, {"path": "nowhere.txt"}, "there is no text at nowhere.txt"),
        (b"\n  \n", {}, "holds no text"),
        (b'{"text": "a"}\n{"text": \n', {}, "no valid JSON"),
        (b'{"body": "a"}\n', {}, "no text under the key text"),
        (b'{"text": "short"}\n', {}, "less than one sequence of 16"),
    ],
)
def test_bad_corpora_are_refused_with_a_sentence(tmp_path, content, changes, words) -> None:
    here = config(tmp_path, **changes)
    if content is not None:
        (tmp_path / "corpus.jsonl").write_bytes(content)
    with pytest.raises(RunError) as error:
        preparation.prepare(here, lambda text: None)
    assert words in error.value.what
    assert error.value.mend
    if "JSON" in words:
        assert error.value.where.endswith("corpus.jsonl:2")


def test_text_that_is_not_utf8_names_the_file_and_byte(tmp_path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(RunError, match=r"x\.txt is not UTF-8 at byte 3"):
        list(documents(config(tmp_path), str(tmp_path / "x.txt")))


def test_embedded_corpus_is_sorted_and_without_tests(tmp_path) -> None:
    found = list(documents(config(tmp_path), "stdlib"))
    assert sum(len(d.text) for d in found) > 5e6
    assert not any("test_" in d.name and "import support" in d.text for d in found)
