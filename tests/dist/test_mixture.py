"""A mixture with documents kept apart: resume is bit-exact in its middle and at borders of passes; ranks change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist import bodies_data, bodies_run
from trainer import config as configuration
from trainer.data import open_data, prepare

CONFIG = """\
name: r
runs: {folder}/runs
model:
  config: {{model_type: llama, hidden_size: 24, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 3,
           num_key_value_heads: 3}}
data:
  mixture:
    prose: {{path: {folder}/prose.txt, documents: paragraph, weight: 2/3, validation_fraction: 0.2}}
    lists: {{path: {folder}/lists.jsonl, weight: 1/3, validation_fraction: 0.2}}
  folder: {folder}/prepared
  tokenizer: {{vocab_size: 301}}
  sequence_length: 16
  document_masking: true
train: {{length: 18 steps, tokens_per_step: 128, micro_batch_size: 2}}
optim: {{name: normuon, lr: 0.01, polar_dtype: fp32}}
parallel: {{name: fsdp2}}
checkpoint: {{every: 50 steps}}
evaluate: {{every: 9 steps, sequences: 8}}
resources: {{device: cpu}}
"""
WORDS = "the of sea light runs over under seven stones while green birds sing and nobody hears it".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two sources; 144 sequences cross the ends of passes over both."""
    folder = tmp_path_factory.mktemp("mixture")
    prose = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 9)) + f" {i}." for i in range(60)]
    lists = [json.dumps({"text": ", ".join(str(i * j) for j in range(9))}) for i in range(25)]
    (folder / "prose.txt").write_text("\n\n".join(prose))
    (folder / "lists.jsonl").write_text("\n".join(lists))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def calm(group, place):
    """The run that nothing disturbs, on two ranks; its answers of both."""
    return group(2, bodies_data.train_recording, str(place / "run.yaml"), ["--name=calm"])


@pytest.fixture(scope="module")
def stream(calm, place):
    config = configuration.load(place / "run.yaml").data
    return open_data(prepare(config, lambda _: pytest.fail("prepared again")), config).train


def steps_of(results) -> list[tuple[int, list[list[int]]]]:
    """(position, sorted inputs of the real rows of all ranks) of each step."""
    steps = zip(*(result["seen"] for result in results), strict=True)
    return [(ranks[0][0], sorted(row for _, rows in ranks for row in rows)) for ranks in steps]


def test_the_run_takes_what_the_stream_says_and_counts_passes(calm, stream, place) -> None:
    first = calm[0]
    assert (first["outcome"], first["position"]) == ("finished", 144)
    for position, rows in steps_of(calm):
        assert rows == sorted(stream.rows(np.arange(position, position + 8))[0][:, :-1].tolist())
    last = [record for record in first["history"] if "loss" in record][-1]
    assert last["epochs"] == {name: round(count, 6) for name, count in stream.epochs(144).items()}
    assert min(last["epochs"].values()) > 1.2
    events = [json.loads(line) for line in (place / "runs/calm/events.jsonl").read_text().splitlines()]
    passes = {(event["source"], event["passes"]) for event in events if event["event"] == "pass"}
    assert passes == {(name, n) for name, count in last["epochs"].items() for n in range(1, int(count) + 1)}
    validation = [record for record in first["history"] if "validation_loss" in record]
    assert len(validation) == 2
    for record in validation:
        losses = {name: one["loss"] for name, one in record["validation_sources"].items()}
        assert record["validation_loss"] == pytest.approx(losses["prose"] * 2 / 3 + losses["lists"] / 3, rel=1e-12)
    assert first["loss"][-1] < first["loss"][0] - 0.5


def border(stream, name: str) -> int:
    """The step in whose middle a pass over `name` ends, or after which one does."""
    return stream.after_epochs(1, name) // 8


@pytest.mark.parametrize("source", ["prose", "lists", None])
def test_resume_in_the_middle_and_at_borders_of_passes_is_bit_equal(group, place, calm, stream, source) -> None:
    stop = 5 if source is None else border(stream, source)
    overrides = [f"--name=at-{source}"]
    group(2, bodies_run.train, str(place / "run.yaml"), overrides, stop)
    second = group(2, bodies_data.train_recording, str(place / "run.yaml"), overrides)
    assert second[0]["started"] == stop
    assert second[0]["tensors"] == calm[0]["tensors"]
    assert second[0]["history"] == calm[0]["history"]
    assert steps_of(second) == steps_of(calm)[stop:]


def test_another_number_of_ranks_takes_the_same_sequences(group, place, calm) -> None:
    seen, losses = [], []
    for world, stop in ((2, 4), (1, 7), (3, 12)):
        results = group(world, bodies_data.train_recording, str(place / "run.yaml"), ["--name=w"], stop)
        seen += steps_of(results)
        losses = results[0]["loss"]
    assert seen == steps_of(calm)[:12]
    assert losses == pytest.approx(calm[0]["loss"][:12], rel=1e-5)


def test_the_end_of_one_source_ends_the_data_and_names_it(group, place, stream) -> None:
    end = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=end", "--data.max_epochs=1"])[0]
    position, name = stream.first_exhausted(1)
    assert end["outcome"] == "out of data"
    assert f"ends the source {name}" in end["message"]
    assert end["position"] == position < 144
    exact = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=exact", "--train.length=1 epochs of lists"])[0]
    assert (exact["outcome"], exact["position"]) == ("finished", stream.after_epochs(1, "lists"))


def test_masking_changes_the_losses_and_is_refused_where_a_model_leaks(group, place, calm) -> None:
    open_ = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=open", "--data.document_masking=false"], 3)[0]
    assert all(abs(a - b) > 1e-4 for a, b in zip(open_["loss"], calm[0]["loss"], strict=False))
    leaky = "{model_type: opt, hidden_size: 24, ffn_dim: 40, num_hidden_layers: 2, num_attention_heads: 2, word_embed_proj_dim: 24}"
    results = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=leaky", f"--model.config={leaky}"])
    for result in results:
        assert "opt does not keep documents apart" in result["error"]


def test_other_text_in_one_source_is_refused_by_its_name(group, place) -> None:
    group(2, bodies_run.train, str(place / "run.yaml"), ["--name=c"], 1)
    text = (place / "lists.jsonl").read_text()
    try:
        (place / "lists.jsonl").write_text(text.replace("0, 1", "1, 0"))
        tokenizer = next((place / "prepared").glob("tokenizer-*"))
        override = [f"--data.tokenizer.path={tokenizer}"]
        assert "data.tokenizer.path was None" in group(1, bodies_run.train, str(place / "run.yaml"), ["--name=c", *override])[0]["error"]
        error = group(1, bodies_run.train, str(place / "run.yaml"), ["--name=c"])[0]["error"]
        assert "than the checkpoint of step 1 was trained on" in error
        error = group(1, bodies_run.train, str(place / "run.yaml"), ["--name=c", "--data.mixture.prose.weight=1/2", "--data.mixture.lists.weight=1/2"])[0]["error"]
        assert "data.mixture.lists.weight was '1/3'" in error
    finally:
        (place / "lists.jsonl").write_text(text)
