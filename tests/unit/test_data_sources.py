"""Every form of text that a source may have, and a sentence for each that is not what it says."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import signal
import time
from importlib import import_module
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.unit.test_data_prepare import WORDS, config, corpus, prepare, quiet, refused
from trainer.config_data import HubName, parse_hub
from trainer.data.corpus import documents, fingerprint
from trainer.files import read_json
from trainer.outcome import Outcome, RunError

TEXTS = [f"{WORDS[i % len(WORDS)]} {i}\nsecond line" for i in range(700)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def lines(texts) -> bytes:
    return "\n".join(json.dumps({"id": 7, "text": text}) for text in texts).encode()


def write_arrow(path: Path, table: pyarrow.Table, *, stream: bool) -> None:
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, 100)


def write_all(folder: Path) -> dict[str, Path]:
    """The same texts in every form."""
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    half = len(TEXTS) // 2
    (folder / "a.jsonl").write_bytes(lines(TEXTS))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:half]) + b"\n") + gzip.compress(lines(TEXTS[half:])))
    (folder / "a.json.zst").write_bytes(zstd(lines(TEXTS[:half]) + b"\n") + zstd(lines(TEXTS[half:])))
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=300)
    write_arrow(folder / "stream.arrow", table, stream=True)
    write_arrow(folder / "file.arrow", table, stream=False)
    return {path.name: path for path in sorted(folder.iterdir())}


def texts_of(tmp_path, path, **changes) -> list[str]:
    return [document.text for document in documents(config(tmp_path, **changes), str(path))]


def test_every_form_gives_the_same_documents(tmp_path) -> None:
    found = write_all(tmp_path)
    assert len(found) == 6
    for name, path in found.items():
        assert texts_of(tmp_path, path) == TEXTS, name


def test_compressed_text_is_cut_like_plain_text(tmp_path) -> None:
    text = "one\ntwo\r\n\n \n\nthrée\rfour\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.zst").write_bytes(zstd(text.encode()))
    for name in ("a.txt", "b.txt.gz", "c.txt.zst"):
        assert texts_of(tmp_path, tmp_path / name) == ["one\ntwo\n\n \n\nthrée\nfour\n"]
        assert texts_of(tmp_path, tmp_path / name, documents="line") == ["one", "two", "thrée", "four"]
        assert texts_of(tmp_path, tmp_path / name, documents="paragraph") == ["one\ntwo", "thrée\nfour"]


def test_forms_make_equal_tables_and_can_be_mixed_in_a_list(tmp_path) -> None:
    found = write_all(tmp_path)
    both = [str(found["a.jsonl.gz"]), str(found["stream.arrow"]), f"hub:{hub_folder(tmp_path)}"]
    names = [document.name for document in documents(config(tmp_path), both)]
    assert len(names) == len(set(names)) == 2 * len(TEXTS) + 3
    digests = set()
    for name in ("a.parquet", "a.json.zst"):
        settings = config(tmp_path, found[name])
        digests.add(read_json(prepare(settings, quiet) / "table.json")["splits"]["train"]["sha256"])
    assert len(digests) == 1


def test_null_is_no_text(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    for name in ("a.parquet", "a.jsonl"):
        assert texts_of(tmp_path, tmp_path / name) == ["a", "b"]


def hub_folder(tmp_path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, form in (("train", "zst"), ("validation", "gz")):
        content = lines([f"{split} {i}" for i in range(3)])
        packed = zstd(content) if form == "zst" else gzip.compress(content)
        (folder / "data" / f"{split}-00000.jsonl.{form}").write_bytes(packed)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nNot to be trained on.")
    return folder


def test_a_local_copy_of_a_dataset_keeps_its_splits(tmp_path) -> None:
    name = f"hub:{hub_folder(tmp_path)}"
    assert texts_of(tmp_path, name) == ["train 0", "train 1", "train 2"]
    assert texts_of(tmp_path, name + ",split=validation") == [f"validation {i}" for i in range(3)]
    for bad, words in ((",split=test", ["test", "train", "validation"]), (",config=x", ["x", "default"])):
        with pytest.raises(RunError) as caught:
            texts_of(tmp_path, name + bad)
        assert all(word in caught.value.what for word in words)
    with pytest.raises(RunError, match="columns here: id, text"):
        texts_of(tmp_path, name, text_key="body")
    before = fingerprint(name)
    (tmp_path / "dataset" / "data" / "train-00000.jsonl.zst").write_bytes(zstd(lines(["other"])))
    assert fingerprint(name) != before


def test_datasets_saved_to_disk_are_read(tmp_path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS[:5]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "more")
    assert texts_of(tmp_path, f"hub:{tmp_path}/one") == TEXTS[:5]
    assert texts_of(tmp_path, f"hub:{tmp_path}/more,split=test") == TEXTS[:5]
    with pytest.raises(RunError, match="no split train"):
        texts_of(tmp_path, f"hub:{tmp_path}/more")
    with pytest.raises(RunError, match="tables .* and other files") as caught:
        texts_of(tmp_path, tmp_path / "one")
    assert f"hub:{tmp_path}/one" in caught.value.mend


def test_hub_names_and_their_options() -> None:
    assert parse_hub("a/b") is None
    assert parse_hub("hub:a/b") == HubName("a/b", None, "train", None)
    full = parse_hub("hub:a/b,revision=1f,config=c d,split=test")
    assert full == HubName("a/b", "c d", "test", "1f")
    assert parse_hub(str(full)) == full
    assert [parse_hub(name).local for name in ("hub:./x", "hub:/x", "hub:~/x", "hub:x/y")] == [True, True, True, False]
    for bad, words in (
        ("hub:", "names no dataset"),
        ("hub:a/b/c", "names no"),
        ("hub:a/b,splt=x", "split="),
        ("hub:a,split=", "split="),
    ):
        with pytest.raises(RunError) as caught:
            parse_hub(bad)
        assert words in str(caught.value)


class Hub:
    """Stands for the hub: one dataset, whose commit is asked for once and read by that commit."""

    def __init__(self) -> None:
        self.asked, self.read = [], []

    def dataset_info(self, name, revision=None, timeout=None):
        assert timeout
        self.asked.append((name, revision))
        return type("Info", (), {"sha": "c0ffee"})

    def load_dataset(self, name, config=None, **options):
        import datasets

        self.read.append((name, config, options))
        return datasets.Dataset.from_dict({"text": TEXTS[:300]}).to_iterable_dataset()


def test_a_hub_name_is_fixed_to_a_commit_and_found_again_without_the_hub(tmp_path, monkeypatch) -> None:
    import datasets
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    settings = config(tmp_path, "hub:owner/name,config=small")
    folder = prepare(settings, quiet)
    assert hub.asked == [("owner/name", None)]
    expected = ("owner/name", "small", {"split": "train", "revision": "c0ffee", "streaming": True})
    assert hub.read == [expected, expected]  # for the tokenizer and for the table
    assert read_json(folder / "table.json")["path"] == "hub:owner/name,config=small,split=train,revision=c0ffee"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    assert prepare(settings, quiet) == folder


def test_a_hub_that_does_not_answer_costs_one_sentence_and_no_retries(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        prepare(config(tmp_path, "hub:owner/name"), quiet)
    assert time.monotonic() - started < 5
    assert caught.value.outcome is Outcome.INFRASTRUCTURE
    assert "the hub does not answer for hub:owner/name" in caught.value.what
    assert "orthogon data prepare" in caught.value.mend
    assert "hub:./FOLDER" in caught.value.mend


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("a.jsonl.gz", lambda good: damaged(gzip.compress(good)), ["a.jsonl.gz", "damaged"]),
        ("a.jsonl.gz", lambda good: gzip.compress(good)[:-500], ["Truncated", "damaged or cut off"]),
        ("a.jsonl.zst", lambda good: zstd(good)[:-100], ["Truncated", "damaged or cut off"]),
        ("a.jsonl.gz", lambda good: good, ["is text", "JSON lines in gzip"]),
        ("a.jsonl", gzip.compress, ["is gzip data", "says JSON lines", ".gz"]),
        ("a.txt", zstd, ["is zstd data", "says text", ".zst"]),
        ("a.parquet", lambda good: good, ["is text", "says parquet"]),
        ("a.parquet", lambda _good: b"PAR1" + b"x" * 500, ["a.parquet cannot be read"]),
        ("a.arrow", lambda _good: b"ARROW1" + b"x" * 500, ["a.arrow cannot be read"]),
        ("a.parquet", lambda _good: b"", ["is empty", "says parquet"]),
        ("a.zip", lambda _good: b"PK\x03\x04" + b"x" * 50, ["archive", "unpack"]),
        ("a.tar.gz", gzip.compress, ["archive", "unpack"]),
        ("a.jsonl.gz", lambda _good: gzip.compress(b'{"text": "a"}\n{"body": 1}\n'), ["a.jsonl.gz:2", "text", "body"]),
        ("a.txt.gz", lambda _good: gzip.compress(b"ab\nc\xff"), ["not UTF-8 at byte 4"]),
    ],
)  # fmt: skip
def test_a_file_that_lies_or_is_damaged_is_named(tmp_path, name, made, words) -> None:
    (tmp_path / name).write_bytes(made(lines(TEXTS)))
    refused(config(tmp_path, tmp_path / name, documents="line"), *words)


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\nzwei\n".encode() + b"x\xff\n")
    for kind in ("file", "line", "paragraph"):
        refused(config(tmp_path, tmp_path / "a.txt", documents=kind), "not UTF-8 at byte 10")


@pytest.mark.parametrize("key", ["body", "id"])
def test_a_column_without_text_is_refused_with_what_is_there(tmp_path, key) -> None:
    found = write_all(tmp_path)
    for name in ("a.parquet", "stream.arrow"):
        words = ["id, text"] if key == "body" else ["int64"]
        refused(config(tmp_path, found[name], text_key=key), name, key, "data.text_key", *words)


def prepare_aloud(settings, pipe) -> None:
    """A preparation in a process of its own, in parts so small that there are several."""
    import_module("trainer.data.make").PART_BYTES = 3000
    pipe.send(f"done {prepare(settings, pipe.send)}")


def test_a_killed_preparation_leaves_no_table_and_goes_on(tmp_path) -> None:
    """SIGKILL at three moments of one preparation; the result equals an undisturbed one, byte for byte."""
    corpus(tmp_path / "corpus")
    context = multiprocessing.get_context("forkserver")
    # What a preparation imports, once for all of them.
    late = ["transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers", "datasets"]
    context.set_forkserver_preload([__name__, *late])

    def attempt(folder: str, moment: str | None) -> list[str]:
        """What a preparation says until it ends, or until it says `moment` and is killed."""
        ours, theirs = context.Pipe(duplex=False)
        settings = config(tmp_path, folder=str(tmp_path / folder))
        process = context.Process(target=prepare_aloud, args=(settings, theirs))
        process.start()
        theirs.close()
        heard = [ours.recv()]
        while not heard[-1].startswith((moment or "done", "done")):
            heard.append(ours.recv())
        if moment:
            process.kill()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if moment else 0)
        tables = [p for p in (tmp_path / folder).glob("corpus-*") if p.suffix != ".partial"]
        assert len(tables) == (0 if moment else 1)
        return heard

    heard = attempt("whole", None)
    tokenized = [line for line in heard if line.startswith("tokenized")]
    assert len(tokenized) > 4
    last = "tokenized " + tokenized[-1].split()[1]
    again = [attempt("killed", m) for m in ("trained a byte-level BPE", "tokenized part-00002", last, None)]
    assert sum("trained" in line for heard_then in again for line in heard_then) == 1
    assert sum(line.endswith("is there already") for line in again[2]) >= 3
    assert sum(line.startswith("tokenized") for line in again[3]) <= 1
    first, second = Path(heard[-1].removeprefix("done ")), Path(again[3][-1].removeprefix("done "))
    assert (first.parent.name, second.parent.name) == ("whole", "killed")
    for file in ("train.arrow", "validation.arrow", "table.json", "tokenizer/tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert sorted(p.name for p in second.iterdir()) == ["table.json", "tokenizer", "train.arrow", "validation.arrow"]


def test_a_table_that_was_whole_but_not_named_is_taken_without_work(tmp_path, monkeypatch) -> None:
    corpus(tmp_path / "corpus", 60)
    settings = config(tmp_path)
    folder = prepare(settings, quiet)
    folder.rename(folder.with_name(folder.name + ".partial"))
    (folder.with_name(folder.name + ".partial") / "part-00000.npz").write_bytes(b"left over")
    monkeypatch.setattr(import_module("trainer.data.make"), "encode", lambda *_: pytest.fail("tokenized again"))
    assert prepare(settings, quiet) == folder
    assert not list(folder.glob("part-*"))
