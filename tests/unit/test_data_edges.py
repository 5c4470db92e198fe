"""Text and tokenizers as the world has them, and errors that must end in a sentence."""

from __future__ import annotations

import errno
import json
from importlib import import_module

import numpy as np
import pytest

from tests.unit.test_data_prepare import config, corpus, prepare, quiet, refused, stream_of
from trainer.config import DataConfig, TokenizerConfig
from trainer.data import open_table
from trainer.data.batches import Batches
from trainer.data.corpus import documents
from trainer.data.pack import encode
from trainer.data.tokenizer import load_tokenizer, train_bpe
from trainer.outcome import Outcome, RunError


def given(tmp_path, **changes):
    return config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "given")), **changes)


def test_markers_written_in_the_text_stay_text(tmp_path):
    train_bpe(["some text"] * 9, 300, tmp_path / "given")
    tokenizer = load_tokenizer(tmp_path / "given")
    tokens, sizes = encode(tokenizer, ["a<|eos|>b"])
    assert (tokens == tokenizer.eos_token_id).sum() == 1
    assert len(tokens) == 2 + len("a<|eos|>b")
    assert sizes.sum() == len("a<|eos|>b")


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(tmp_path):
    train_bpe(["some text"] * 9, 258, tmp_path / "given")
    backend = load_tokenizer(tmp_path / "given").backend_tokenizer
    backend.enable_truncation(8)
    backend.enable_padding(length=12, pad_id=1, pad_token="<|eos|>")
    backend.save(str(tmp_path / "given" / "tokenizer.json"))
    tokens, sizes = encode(load_tokenizer(tmp_path / "given"), ["x" * 50, "y"])
    assert len(tokens) == 52 + 3
    assert (sizes <= 1).all()


def test_a_long_document_is_encoded_in_pieces_that_change_nothing(tmp_path, monkeypatch):
    pack = import_module("trainer.data.pack")
    text = "".join(f"line {i} é\n" + " \n" * (i % 3) + "  x = 1\n" for i in range(300))
    train_bpe([text], 400, tmp_path / "given")
    tokenizer = load_tokenizer(tmp_path / "given")
    whole = encode(tokenizer, [text])
    monkeypatch.setattr(pack, "PIECE", 100)
    assert len(list(pack.pieces(text))) > 10
    for a, b in zip(whole, encode(tokenizer, [text]), strict=True):
        assert a.tolist() == b.tolist()
    assert "".join(pack.pieces("x" * 1000)) == "x" * 1000


def test_a_tokenizer_without_tokenizer_json_is_recognized(tmp_path):
    corpus(tmp_path / "corpus", 60)
    train_bpe(["some text"] * 9, 300, tmp_path / "full")
    model = json.loads((tmp_path / "full" / "tokenizer.json").read_text())["model"]
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "given" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "given" / "config.json").write_text('{"model_type": "gpt2"}')
    folder = prepare(given(tmp_path), quiet)
    assert open_table(folder, given(tmp_path)).train.sequences > 0
    (tmp_path / "given" / "merges.txt").write_text("")
    with pytest.raises(RunError, match="another tokenizer"):
        open_table(folder, given(tmp_path))


def test_tokens_beyond_the_vocabulary_are_refused_when_the_table_is_made(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    corpus(tmp_path / "corpus", 60)
    holes = Tokenizer(models.WordLevel({"<e>": 0, "?": 1, "plain": 70_000}, unk_token="?"))
    holes.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=holes, unk_token="?", eos_token="<e>")
    wrapped.save_pretrained(tmp_path / "given")
    refused(given(tmp_path), "70000", "vocabulary")
    assert not [f for f in (tmp_path / "prepared").iterdir() if (f / "table.json").exists()]


def test_a_missing_tokenizer_beside_a_table_is_a_sentence(tmp_path):
    corpus(tmp_path / "corpus", 60)
    folder = prepare(config(tmp_path), quiet)
    with pytest.raises(RunError, match="given"):
        open_table(folder, given(tmp_path))


def test_a_missing_split_file_is_a_sentence(tmp_path):
    corpus(tmp_path / "corpus", 60)
    folder = prepare(config(tmp_path), quiet)
    (folder / "validation.arrow").unlink()
    with pytest.raises(RunError, match=r"validation\.arrow"):
        open_table(folder, config(tmp_path))


def test_half_a_surrogate_pair_is_refused_by_line(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"text": "a"}\n{"text": "x\\ud800"}\n')
    refused(config(tmp_path, tmp_path / "records.jsonl"), "records.jsonl:2", "UTF-8")


def test_lines_end_at_line_ends_only(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still\x0cone\r\ntwo\x85\n".encode())
    found = [d.text for d in documents(config(tmp_path, documents="line"), str(tmp_path / "a.txt"))]
    assert found == ["one\u2028still\x0cone", "two\x85"]


def test_hidden_folders_are_no_corpus(tmp_path):
    corpus(tmp_path / "corpus", 3)
    (tmp_path / "corpus" / ".git").mkdir()
    (tmp_path / "corpus" / ".git" / "index").write_bytes(b"\xff\xfe")
    assert len(list(documents(config(tmp_path), str(tmp_path / "corpus")))) == 3


def test_equal_names_in_two_folders_are_two_documents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        (tmp_path / "corpus" / name / "same.txt").write_text(name)
    names = [d.name for d in documents(config(tmp_path), str(tmp_path / "corpus"))]
    assert len(set(names)) == 2


def test_prepare_takes_a_given_table_as_it_is(tmp_path):
    corpus(tmp_path / "corpus", 60)
    folder = prepare(config(tmp_path), quiet)
    settings = DataConfig(table=str(folder), sequence_length=16)
    assert prepare(settings, quiet) == folder
    with pytest.raises(RunError, match="no token table"):
        prepare(DataConfig(table=str(tmp_path), sequence_length=16), quiet)


def test_what_is_left_out_of_training_is_counted_and_said(tmp_path):
    corpus(tmp_path / "corpus", 60)
    corpus(tmp_path / "held", 10)
    said = []
    settings = config(tmp_path, validation_path=str(tmp_path / "held"))
    facts = open_table(prepare(settings, said.append), settings).facts
    left_out = 60 - facts["splits"]["train"]["documents"]
    assert facts["left_out_of_training"] == left_out > 0
    assert [line for line in said if str(left_out) in line and "left out" in line]


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path):
    corpus(tmp_path / "corpus", 60)

    def meddle(line):
        if line.startswith("tokenized"):
            (tmp_path / "corpus" / "0000.txt").write_text("changed")

    with pytest.raises(RunError, match="changed while"):
        prepare(config(tmp_path), meddle)


def test_a_full_disk_has_its_own_outcome(tmp_path, monkeypatch):
    corpus(tmp_path / "corpus", 60)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError) as caught:
        prepare(config(tmp_path), quiet)
    assert caught.value.outcome is Outcome.NO_SPACE


def test_a_step_that_does_not_fit_its_rows_is_an_error(tmp_path):
    corpus(tmp_path / "corpus", 60)
    table = open_table(prepare(config(tmp_path), quiet), config(tmp_path))
    batches = Batches(table.train, 0, 2, 2, 3)
    assert len(batches.at(0, 12)) == 3
    with pytest.raises(ValueError, match="13"):
        batches.at(0, 13)
    assert batches.bytes(0, 0) == 0
    assert all((batch.targets == -100).all() for batch in batches.at(0, 0))
    with pytest.raises(ValueError, match="beyond"):
        Batches(table.validation, 0, 1, 4, 1).at(table.validation.sequences - 1, 2)


def test_rows_come_in_the_order_asked_also_twice(tmp_path):
    corpus(tmp_path / "corpus", 60)
    table = open_table(prepare(config(tmp_path), quiet), config(tmp_path))
    stream, sizes = stream_of(table.train)
    ids = np.array([5, 0, 5, table.train.sequences - 1])
    tokens, found = table.train.rows(ids)
    assert [row.tolist() for row in tokens] == [stream[i * 16 : i * 16 + 17].tolist() for i in ids]
    assert found.tolist() == sizes[ids].tolist()
