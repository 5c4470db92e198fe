"""Text to table: round trip, bytes, splits, restart, damage, and a sentence for every bad input."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from trainer.config import DataConfig, TokenizerConfig
from trainer.data import open_table, verify
from trainer.data import prepare as prepare_sources
from trainer.data.corpus import documents, files
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest, train_bpe
from trainer.files import sha256_file
from trainer.outcome import RunError

WORDS = ["naïve", "Straße", "日本語", "😀", "plain", "def f(x):", "\treturn", "e\u0301", "tail  ", "ключ"]


def corpus(folder, count=120, seed=0):
    """Files of words of one to four UTF-8 bytes per character; every third repeats an earlier text."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    texts = []
    for index in range(count):
        text = " ".join(random.choice(WORDS, random.integers(5, 60))) + "\n"
        text = texts[index // 2] if index % 3 == 2 else text
        texts.append(text)
        (folder / f"{index:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def config(tmp_path, path=None, **changes):
    given = {
        "path": str(path or tmp_path / "corpus"),
        "folder": str(tmp_path / "prepared"),
        "validation_fraction": 0.3,
        "tokenizer": TokenizerConfig(vocab_size=300),
        "sequence_length": 16,
    }
    return DataConfig(**(given | changes))


def quiet(_line: str) -> None:
    pass


def prepare(settings, say):
    """The table of a configuration with one source."""
    (folder,) = prepare_sources(settings, say).values()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table that several tests read: (config, table, folder)."""
    tmp_path = tmp_path_factory.mktemp("made")
    corpus(tmp_path / "corpus")
    settings = config(tmp_path)
    folder = prepare(settings, quiet)
    return settings, open_table(folder, settings), folder


def texts_of(settings, split):
    """The texts of a split, by the rule of the documentation and not by the code's own function."""
    for document in documents(settings, settings.path):
        share = int(hashlib.sha256(document.text.encode()).hexdigest()[:8], 16) / 2**32
        if (share < settings.validation_fraction) == (split == "validation"):
            yield document.text


def stream_of(split):
    """The rows' tokens as one stream again; checks the overlap of one token."""
    tokens, sizes = split.rows(np.arange(split.sequences))
    assert tokens.dtype == sizes.dtype == np.int64
    assert (tokens[1:, 0] == tokens[:-1, -1]).all()
    return np.concatenate([tokens[:1, 0], tokens[:, 1:].ravel()]), sizes


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_decode_to_the_documents(made, split):
    settings, table, folder = made
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream, _ = stream_of(getattr(table, split))
    whole = "".join(f"<|bos|>{text}<|eos|>" for text in texts_of(settings, split))
    expected = tokenizer.backend_tokenizer.encode(whole).ids
    assert len(stream) > 100
    assert stream.tolist() == expected[: len(stream)]
    facts = table.facts["splits"][split]
    assert facts["tokens"] == len(stream) - 1 == facts["sequences"] * settings.sequence_length
    assert facts["dropped_tokens"] == len(expected) - len(stream) < settings.sequence_length
    decoded = tokenizer.backend_tokenizer.decode(stream.tolist(), skip_special_tokens=False)
    assert whole.encode().startswith(decoded.encode().rstrip(b"\xef\xbf\xbd"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_bytes_are_the_bytes_of_the_text(made, split):
    _, table, folder = made
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream, sizes = stream_of(getattr(table, split))
    ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_token_id]
    # Whole documents only, so that no character is cut: count row by row up to the last end of a document.
    letters = tokenizer.backend_tokenizer.get_vocab()
    names = {i: name for name, i in letters.items()}
    true = [0 if t in (tokenizer.bos_token_id, tokenizer.eos_token_id) else len(names[t]) for t in stream.tolist()]
    assert ends
    # One byte is one letter of the byte-level alphabet. A row may cut a character: then up to 3 bytes move over.
    rows = np.array(true[1:]).reshape(len(sizes), -1).sum(axis=1)
    assert np.abs(np.cumsum(rows) - np.cumsum(sizes)).max() <= 3
    assert table.facts["splits"][split]["bytes"] == sizes.sum()


def test_bytes_sum_exactly_where_nothing_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("ä€😀x\n" * 40, encoding="utf-8")
    (tmp_path / "b.txt").write_text("zwölf €\n" * 40, encoding="utf-8")
    settings = config(
        tmp_path, tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt"), tokenizer=TokenizerConfig(vocab_size=258)
    )
    # A vocabulary of bytes alone: n bytes are n tokens, with BOS and EOS n + 1 targets.
    size = (tmp_path / "a.txt").stat().st_size
    length = next(k for k in range(2, size + 2) if (size + 1) % k == 0)
    settings = config(
        tmp_path, settings.path, validation_path=settings.validation_path, tokenizer=settings.tokenizer,
        sequence_length=length,
    )  # fmt: skip
    facts = json.loads((prepare(settings, quiet) / "table.json").read_text())["splits"]["train"]
    assert facts["dropped_tokens"] == 0
    assert (facts["bytes"], facts["tokens"]) == (size, size + 1)


def test_splits_are_disjoint_and_complete(made):
    settings, table, _ = made
    train, held_back = set(texts_of(settings, "train")), set(texts_of(settings, "validation"))
    assert train
    assert held_back
    assert not train & held_back
    splits = table.facts["splits"]
    counts = [splits[name]["documents"] for name in ("train", "validation")]
    assert counts == [len(list(texts_of(settings, name))) for name in ("train", "validation")]
    assert sum(counts) == len(list(documents(settings, settings.path)))
    assert sum(counts) > len(train | held_back)  # there were duplicates


def test_a_given_validation_text_is_left_out_of_training(tmp_path):
    corpus(tmp_path / "corpus", 60)
    corpus(tmp_path / "held", 10)  # the same seed: these texts are also in the corpus
    settings = config(tmp_path, validation_path=str(tmp_path / "held"))
    folder = prepare(settings, quiet)
    table = open_table(folder, settings)
    held = {d.text for d in documents(settings, str(tmp_path / "held"))}
    kept = [d.text for d in documents(settings, str(tmp_path / "corpus")) if d.text not in held]
    assert len(kept) < 60
    assert table.facts["splits"]["train"]["documents"] == len(kept)
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream, _ = stream_of(table.train)
    expected = tokenizer.backend_tokenizer.encode("".join(f"<|bos|>{text}<|eos|>" for text in kept)).ids
    assert stream.tolist() == expected[: len(stream)]


def test_unigram_entropy_of_the_validation_targets(made):
    _, table, _ = made
    stream, sizes = stream_of(table.validation)
    counts = np.bincount(stream[1:])
    share = counts[counts > 0] / counts.sum()
    expected = -(share * np.log2(share)).sum() * counts.sum() / sizes.sum()
    assert table.facts["unigram_bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_a_finished_table_is_taken_as_it_is(made):
    settings, _, folder = made
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert prepare(settings, quiet) == folder
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    assert not [f for f in folder.parent.iterdir() if f.name.endswith(".partial")]


@pytest.mark.parametrize("change", [{"sequence_length": 8}, {"validation_fraction": 0.4}, {"documents": "line"}])
def test_other_settings_make_another_table(made, change):
    settings, _, folder = made
    assert prepare(DataConfig(**(vars(settings) | change)), quiet) != folder


def test_a_changed_corpus_makes_another_table(tmp_path):
    corpus(tmp_path / "corpus", 60)
    first = prepare(config(tmp_path), quiet)
    (tmp_path / "corpus" / "0001.txt").write_text("other text", encoding="utf-8")
    assert prepare(config(tmp_path), quiet) != first


def test_restart_keeps_finished_parts_and_ends_the_same(tmp_path, monkeypatch):
    from importlib import import_module

    module = import_module("trainer.data.make")
    corpus(tmp_path / "corpus")
    monkeypatch.setattr(module, "PART_BYTES", 3000)
    whole = prepare(config(tmp_path, folder=str(tmp_path / "whole")), quiet)
    real, calls = module._make_part, []

    def dying(entries, tokenizer, path, splits, say):
        if path.name == "part-00002.npz":
            raise KeyboardInterrupt
        return real(entries, tokenizer, path, splits, say)

    monkeypatch.setattr(module, "_make_part", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path), quiet)
    partial = next((tmp_path / "prepared").glob("*.partial"))
    assert sorted(p.name for p in partial.glob("*.npz")) == ["part-00000.npz", "part-00001.npz"]
    (partial / "part-00001.npz").write_bytes(b"torn")
    monkeypatch.setattr(module, "_make_part", real)
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda tokenizer, texts: calls.append(texts) or encode(tokenizer, texts))
    monkeypatch.setattr(
        import_module("trainer.data.prepare"), "train_bpe", lambda *_: pytest.fail("the tokenizer was trained again")
    )
    again = prepare(config(tmp_path), quiet)
    a, b = (json.loads((f / "table.json").read_text()) for f in (whole, again))
    assert a == b
    assert sha256_file(again / "train.arrow") == a["splits"]["train"]["sha256"]
    # Every text once, but for those of the first part; the torn one is made again.
    done = sum(len(texts) for texts in calls)
    total = sum(a["splits"][s]["documents"] for s in ("train", "validation"))
    kept = total - done
    assert 0 < kept < total
    first = next(iter(documents(config(tmp_path), str(tmp_path / "corpus")))).text
    assert calls[0][0] != first


def test_a_flipped_bit_is_found(tmp_path):
    corpus(tmp_path / "corpus", 60)
    folder = prepare(config(tmp_path), quiet)
    verify(folder)
    path = folder / "train.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"train\.arrow"):
        verify(folder)
    path.write_bytes(content[:-8])
    with pytest.raises(RunError, match=f"{len(content)} bytes"):
        verify(folder)
    path.unlink()
    with pytest.raises(RunError, match=r"train\.arrow"):
        verify(folder)


def test_training_the_tokenizer_is_deterministic(tmp_path):
    texts = [f.read_text() for f in sorted(corpus(tmp_path / "corpus").iterdir())]
    for name in ("a", "b"):
        train_bpe(iter(texts), 400, tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert tokenizer_digest(tmp_path / "a") == sha256_file(tmp_path / "b" / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "a")
    assert 258 < len(tokenizer) <= 400
    everything = bytes(range(256)).decode("latin-1") + "日本 😀\r\n\0"
    assert tokenizer.decode(tokenizer(everything, add_special_tokens=False).input_ids) == everything


def test_the_tokenizer_sees_training_documents_only(tmp_path):
    (tmp_path / "train.txt").write_text("alpha beta gamma " * 200)
    (tmp_path / "held.txt").write_text("zyxwvut zyxwvut " * 2000)
    settings = config(tmp_path, tmp_path / "train.txt", validation_path=str(tmp_path / "held.txt"))
    vocabulary = load_tokenizer(prepare(settings, quiet) / "tokenizer").get_vocab()
    assert "Ġalpha" in vocabulary
    assert not [token for token in vocabulary if "zy" in token]


def test_the_embedded_corpus_is_python_source_without_tests():
    found = files("stdlib")
    assert len(found) > 400
    assert all(file.suffix == ".py" for file in found)
    assert not [f for f in found if {"test", "tests", "site-packages", "__pycache__"} & set(f.parts[-4:-1])]


def test_documents_are_files_paragraphs_lines_or_records(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n \n\n  four\n")
    (tmp_path / "b.jsonl").write_text('{"text": "rec\\nord", "x": 1}\n\n{"text": "zwei"}\n')

    def texts(**changes):
        return [d.text.strip("\n") for d in documents(config(tmp_path, **changes), [str(tmp_path / "*.txt")])]

    assert texts() == ["one\ntwo\n\nthree\n \n\n  four"]
    assert texts(documents="paragraph") == ["one\ntwo", "three", "  four"]
    assert texts(documents="line") == ["one", "two", "three", "  four"]
    records = [d.text for d in documents(config(tmp_path), str(tmp_path / "b.jsonl"))]
    assert records == ["rec\nord", "zwei"]


def refused(settings, *words):
    with pytest.raises(RunError) as caught:
        prepare(settings, quiet)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.mend


def test_bad_corpora_are_refused(tmp_path):
    refused(config(tmp_path, tmp_path / "nowhere"), "nowhere")
    refused(config(tmp_path, str(tmp_path / "*.none")), "*.none")
    (tmp_path / "empty").mkdir()
    refused(config(tmp_path, tmp_path / "empty"), "empty")
    (tmp_path / "blank.txt").write_text(" \n\n")
    refused(config(tmp_path, tmp_path / "blank.txt"), "no text", "blank.txt")
    (tmp_path / "latin.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    refused(config(tmp_path, tmp_path / "latin.txt"), "latin.txt", "UTF-8")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["records.jsonl:3", "JSON"]),
        ('{"body": "x"}', ["records.jsonl:3", "text", "body"]),
        ('{"text": 5}', ["records.jsonl:3", "text"]),
        ("[1]", ["records.jsonl:3", "text"]),
    ],
)
def test_bad_records_are_refused_by_line(tmp_path, line, words):
    (tmp_path / "records.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    refused(config(tmp_path, tmp_path / "records.jsonl"), *words)


def test_too_little_text_is_refused_with_numbers(tmp_path):
    corpus(tmp_path / "corpus", 60)
    refused(config(tmp_path, sequence_length=100_000), "train", "100000", "data.sequence_length")
    (tmp_path / "one.txt").write_text("alone " * 500)
    fraction = 1e-9
    refused(config(tmp_path, tmp_path / "one.txt", validation_fraction=fraction), "validation", "16", "paragraph")


def test_bad_tokenizers_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    corpus(tmp_path / "corpus", 20)
    refused(config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "absent"))), "absent", "tokenizer")
    (tmp_path / "hollow").mkdir()
    refused(config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "hollow"))), "hollow", "tokenizer")
    bare = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="?").save_pretrained(tmp_path / "bare")
    refused(config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "bare"))), "BOS", "EOS")


def test_a_given_tokenizer_is_used_and_recognized(tmp_path, made):
    _, _, other = made
    corpus(tmp_path / "corpus", 60)
    train_bpe(["quite another text"] * 9, 280, tmp_path / "given")
    settings = config(tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "given")))
    folder = prepare(settings, quiet)
    table = open_table(folder, settings)
    assert table.facts["tokenizer_digest"] == tokenizer_digest(tmp_path / "given")
    wrong = DataConfig(**(vars(settings) | {"tokenizer": TokenizerConfig(path=str(other / "tokenizer"))}))
    with pytest.raises(RunError, match="another tokenizer"):
        open_table(folder, wrong)


def test_a_table_that_does_not_fit_is_refused(made, tmp_path):
    settings, _, folder = made
    with pytest.raises(RunError, match=r"16.*32"):
        open_table(folder, DataConfig(**(vars(settings) | {"sequence_length": 32})))
    with pytest.raises(RunError, match="no token table"):
        open_table(tmp_path, settings)
    with pytest.raises(RunError, match="no token table"):
        verify(tmp_path)
