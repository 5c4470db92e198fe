"""The test split, and how much of what is held back occurs in training, too."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from tests.unit.test_data_prepare import config, corpus, made, prepare, quiet, stream_of
from trainer.data import open_table
from trainer.data.corpus import documents
from trainer.data.make import divided
from trainer.data.overlap import WINDOW, seen_in_training
from trainer.data.tokenizer import load_tokenizer
from trainer.outcome import RunError

__all__ = ["made"]  # a fixture


def rule(text, settings):
    """The split of a text by the rule of the documentation."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "validation" if place < 0.3 else "test" if place < 0.3 + settings.test_fraction else "train"


def test_a_test_split_is_a_third_part_and_leaves_validation_as_it_was(made, tmp_path):
    settings = replace(made[0], test_fraction=0.2, folder=str(tmp_path))
    table = open_table(folder := prepare(settings, quiet), settings)
    kept = {split: [] for split in ("train", "validation", "test")}  # equal texts are several documents
    for document in documents(settings, settings.path):
        kept[rule(document.text, settings)].append(document.text)
    assert {split: facts["documents"] for split, facts in table.facts["splits"].items()} == {
        split: len(texts) for split, texts in kept.items()
    }
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream, _ = stream_of(table.test)
    text = tokenizer.backend_tokenizer.decode(stream.tolist(), skip_special_tokens=False)
    assert {part.removeprefix("<|bos|>") for part in text.split("<|eos|>")[:-1]} <= set(kept["test"])
    assert set(made[1].facts["splits"]) == {"train", "validation"}
    with pytest.raises(RunError, match=r"validation and test together are 1.1 of the documents"):
        prepare(replace(settings, test_fraction=0.8), quiet)


def test_texts_of_the_test_are_in_neither_of_the_others(tmp_path):
    source = corpus(tmp_path / "corpus")
    files = sorted(source.iterdir())
    for name, some in (("held", files[:8]), ("test", files[4:12])):
        (tmp_path / name).mkdir()
        for file in some:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    settings = config(tmp_path, validation_path=str(tmp_path / "held"), test_path=str(tmp_path / "test"))
    split_of = {}
    for split, document in divided(settings):
        split_of.setdefault(document.text, []).append(split)
    texts = [file.read_text(encoding="utf-8") for file in files]
    for text in texts:  # some are equal
        wanted = "test" if text in texts[4:12] else "validation" if text in texts[:8] else "train"
        assert set(split_of[text]) - {""} == {wanted}


@effort(max_examples=30, deadline=None)
@given(st.data())
def test_windows_that_occur_in_training_are_those_that_a_slow_search_finds(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("overlap")
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    train = [generator.integers(0, 3, data.draw(st.integers(0, 200))) for _ in range(2)]
    held = generator.integers(0, 3, data.draw(st.integers(0, 130)))
    held[: min(len(held), len(train[0]))] = train[0][: min(len(held), len(train[0]))]
    parts = [tmp_path / "0.npz", tmp_path / "1.npz"]
    np.savez(parts[0], train_tokens=train[0], validation_tokens=held[:70])
    np.savez(parts[1], train_tokens=train[1], validation_tokens=held[70:])
    slow = {tuple(t[i : i + WINDOW]) for t in train for i in range(len(t) - WINDOW + 1)}
    asked = [tuple(t[i : i + WINDOW]) for t in (held[:70], held[70:]) for i in range(len(t) - WINDOW + 1)]
    expected = sum(window in slow for window in asked) / len(asked) if asked else 0.0
    assert seen_in_training(parts, ("validation",)) == {"validation": expected}
