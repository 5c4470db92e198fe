"""Resume is bit-exact; another number of ranks sees the same data; every end is orderly and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import bodies_run

CONFIG = """\
name: r
runs: {folder}/runs
model:
  config: {{model_type: llama, hidden_size: 24, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 3,
           num_key_value_heads: 3}}
data:
  path: {folder}/corpus.txt
  folder: {folder}/prepared
  documents: paragraph
  validation_fraction: 0.2
  tokenizer: {{vocab_size: 301}}
  sequence_length: 16
train:
  length: 40 steps
  tokens_per_step: 128
  micro_batch_size: 2
optim:
  name: normuon
  lr: 0.01
  polar_dtype: fp32
parallel: {{name: fsdp2}}
checkpoint: {{every: 13 steps, keep: 2}}
evaluate: {{every: 7 steps}}
metrics: {{groups_every: 5 steps}}
resources: {{device: cpu}}
"""


# Not finite both times that it is computed.
NAN = "nan@step.gradient rank=0 step={step} times=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus of about 30 sequences per epoch (40 steps of 8 cross several) and a vocabulary that
    divides by neither 2 nor 3."""
    folder = tmp_path_factory.mktemp("runs")
    words = "the of sea light runs over under seven stones while green birds sing and nobody hears it".split()
    lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + f" {i}." for i in range(40)]
    (folder / "corpus.txt").write_text("\n\n".join(lines))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def calm(group, place):
    """The run that nothing disturbs, on two ranks."""
    return group(2, bodies_run.train, str(place / "run.yaml"), ["--name=calm"])[0]


def resumed(group, place, name: str, stops: list[tuple[int, int | None]], *extra: str):
    """One run in attempts of (ranks, step at which a signal stops it); the result of each attempt."""
    overrides = [f"--name={name}", *extra]
    return [group(world, bodies_run.train, str(place / "run.yaml"), overrides, stop)[0] for world, stop in stops]


def test_the_calm_run_finishes_and_crosses_epochs(calm, place) -> None:
    assert (calm["outcome"], calm["step"], calm["position"]) == ("finished", 40, 320)
    steps = [r["step"] for r in calm["history"] if "loss" in r]
    assert steps == list(range(1, 41))
    assert calm["history"][-1]["epoch"] > 2 if "epoch" in calm["history"][-1] else True
    assert max(r.get("epoch", 0) for r in calm["history"]) > 2
    assert calm["loss"][-1] < calm["loss"][0] - 1
    assert sum("validation_loss" in r for r in calm["history"]) == 6
    names = sorted(p.name for p in (place / "runs/calm/checkpoints").iterdir())
    assert names == ["step-00000039", "step-00000040"]


@pytest.mark.parametrize("stop", [1, 7, 13, 26, 39])
def test_k_steps_and_resume_are_bit_equal_to_the_calm_run(group, place, calm, stop) -> None:
    first, second = resumed(group, place, f"k{stop}", [(2, stop), (2, None)])
    assert (first["outcome"], first["step"], second["started"]) == ("preempted", stop, stop)
    assert second["outcome"] == "finished"
    assert second["tensors"] == calm["tensors"]
    assert second["history"] == calm["history"]


def test_keeping_weights_gathered_changes_nothing_but_memory(group, place, calm) -> None:
    """Saved right after a validation, too: there the gathered weights must be gone."""
    kept = resumed(group, place, "kept", [(2, 14), (2, None)], "--parallel.reshard_after_forward=false")
    assert kept[-1]["outcome"] == "finished"
    assert kept[-1]["tensors"] == calm["tensors"]
    assert kept[-1]["history"] == calm["history"]


def test_one_process_and_late_synchronization_agree(group, place, calm) -> None:
    for name, world, override in (("s", 1, "--parallel.name=single"), ("late", 2, "--parallel.sync_every_micro_step=false")):
        losses = resumed(group, place, name, [(world, 12)], override)[0]["loss"]
        assert losses == pytest.approx(calm["loss"][:12], rel=1e-5)


def test_bf16_trains_under_both_strategies(group, place, calm) -> None:
    for name, world, strategy in (("b1", 1, "single"), ("b2", 2, "fsdp2")):
        overrides = ("--train.precision=bf16", f"--parallel.name={strategy}")
        losses = resumed(group, place, name, [(world, 20)], *overrides)[0]["loss"]
        assert losses[-1] == pytest.approx(calm["loss"][19], abs=0.15)
        assert losses != calm["loss"][:20]


def test_another_order_seed_is_another_run(group, place, calm) -> None:
    """Negative control of the equality above."""
    other = resumed(group, place, "other", [(2, 3)], "--data.order_seed=1")[0]
    assert other["loss"][:3] != calm["loss"][:3]


def test_world_size_2_1_3_keeps_data_and_losses(group, place, calm) -> None:
    attempts = resumed(group, place, "w", [(2, 6), (1, 13), (3, 20)])
    assert [a["position"] for a in attempts] == [48, 104, 160]
    losses = attempts[-1]["loss"]
    assert len(losses) == 20
    for mine, reference in zip(losses, calm["loss"], strict=False):
        assert mine == pytest.approx(reference, rel=1e-5)
    groups = [r["groups"] for r in attempts[-1]["history"] if "groups" in r]
    assert len(groups) == 4
    for mine, reference in zip(groups, (r["groups"] for r in calm["history"] if "groups" in r), strict=False):
        for name, figures in mine.items():
            for key in ("gradient_norm", "update_rms", "weight_rms"):
                assert figures[key] == pytest.approx(reference[name][key], rel=1e-3), (name, key)


def test_squares_of_the_groups_gradient_norms_add_up_to_that_of_the_whole(calm) -> None:
    """Before clipping, which is at work here: norms above and below train.clip_norm = 1."""
    measured = [r for r in calm["history"] if "groups" in r]
    assert [r["step"] for r in measured] == [5, 10, 15, 20, 25, 30, 35, 40]
    for record in measured:
        assert list(record["groups"]) == ["matrices", "embeddings", "vectors"]
        total = sum(figures["gradient_norm"] ** 2 for figures in record["groups"].values())
        assert total == pytest.approx(record["gradient_norm"] ** 2, rel=1e-6)
        assert record["groups"]["matrices"]["learning_rate"] == pytest.approx(0.01 * record["learning_rate_factor"])
    assert max(r["gradient_norm"] for r in measured) > 1


def test_every_key_of_the_history_is_explained(calm, place) -> None:
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    for line in (place / "runs/calm/metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in [*record, *(key for figures in record.get("groups", {}).values() for key in figures)]:
            assert f"| `{key}`" in page, key


def test_a_sink_and_a_trace_of_a_whole_run(group, place) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ("--metrics.sinks=[{name: tensorboard}]", "--metrics.profile=[3, 2]", "--train.length=12 steps")
    history = resumed(group, place, "sink", [(2, 6), (2, None)], *overrides)[-1]["history"]
    folder = place / "runs/sink"
    events = EventAccumulator(str(folder / "sinks/tensorboard")).Reload()
    for key in ("loss", "bits_per_byte", "validation_loss", "gradient_norm"):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(key)] == [
            (r["step"], r[key]) for r in history if key in r
        ]
    assert [e.step for e in events.Scalars("groups/embeddings/update_rms")] == [5, 10]
    assert sorted(p.name for p in (folder / "profile/1").iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    assert not (folder / "profile/2").exists()


def test_sinks_and_traces_that_cannot_be_are_refused_before_the_data(group, place) -> None:
    for override, words in (
        ("--metrics.sinks=[{name: wandb}, {name: wandb}]", "the sink wandb is given twice"),
        ("--metrics.memory_snapshot=[1, 2]", "records CUDA's allocator"),
    ):
        for result in group(2, bodies_run.train, str(place / "run.yaml"), ["--name=cannot", "--data.path=/none", override]):
            assert words in result["error"]


def test_end_of_data_saves_and_says_so(group, place) -> None:
    end = resumed(group, place, "end", [(2, None)], "--data.max_epochs=1", "--train.length=1000 steps")[0]
    assert end["outcome"] == "out of data"
    assert "data.max_epochs = 1" in end["message"]
    manifest = json.loads(next((place / "runs/end/checkpoints").glob(f"step-{end['step']:08d}/manifest.json")).read_text())
    assert manifest["manifest"]["position"] == end["position"] == manifest["manifest"]["state"]["data"]["sources"]["data"]["sequences"]


def test_a_nan_on_one_rank_is_applied_by_none_and_the_window_recorded(group, place, calm) -> None:
    results = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=nan"], 6, NAN.format(step=5))
    for result in results:
        assert result["skipped"] == [[32, 8]]
    first = results[0]
    assert [r["loss"] for r in first["history"] if "loss" in r][4] is None or first["history"][4]["gradient_norm"] is None
    assert first["loss"][:4] == calm["loss"][:4]
    second = group(2, bodies_run.train, str(place / "run.yaml"), ["--name=nan"], 8)[0]
    assert second["skipped"] == [[32, 8]]
    assert all(r["loss"] is not None for r in second["history"][6:] if "loss" in r)


def test_divergence_ends_with_its_own_outcome_and_leaves_finite_checkpoints(group, place) -> None:
    end = resumed(group, place, "div", [(2, None)], "--optim.lr=1e30", "--optim.adamw.lr=1e30", "--guard.max_skips=2")[0]
    assert end["outcome"] == "diverged"
    shards = list((place / "runs/div/checkpoints").glob("step-*/*.safetensors"))
    assert shards
    assert all(torch.isfinite(t).all() for shard in shards for t in load_file(shard).values() if t.is_floating_point())


def test_changed_data_tokenizer_and_model_are_refused(group, place) -> None:
    resumed(group, place, "c", [(2, 2)])
    before = sorted((place / "runs/c/checkpoints").iterdir())
    text = resumed(group, place, "c", [(1, None)], "--model.config.hidden_size=48")[0]["error"]
    assert "model.config.hidden_size was 24" in text
    text = resumed(group, place, "c", [(1, None)], "--data.sequence_length=8")[0]["error"]
    assert "data.sequence_length was 16" in text
    corpus = (place / "corpus.txt").read_text()
    (place / "corpus.txt").write_text(corpus + "\n\nOne more paragraph, about something else.")
    try:
        text = resumed(group, place, "c", [(1, None)])[0]["error"]
    finally:
        (place / "corpus.txt").write_text(corpus)
    assert "than the checkpoint of step 2 was trained on" in text
    assert sorted((place / "runs/c/checkpoints").iterdir()) == before


def test_a_damaged_table_and_too_little_text_are_refused(group, place, tmp_path) -> None:
    table = next(p for p in (place / "prepared").iterdir() if (p / "table.json").exists())
    copy = tmp_path / "table"
    shutil.copytree(table, copy)
    data = bytearray((copy / "train.arrow").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "train.arrow").write_bytes(data)
    text = resumed(group, place, "d", [(2, None)], "--data.path=null", f"--data.table={copy}")[0]["error"]
    assert "the token table is damaged: train.arrow" in text
    text = resumed(group, place, "e", [(2, None)], "--data.sequence_length=8192", "--train.tokens_per_step=16384")[0]["error"]
    assert "less than one sequence of 8192" in text


def test_more_ranks_than_sequences_are_refused(group, place) -> None:
    text = resumed(group, place, "f", [(3, None)], "--train.tokens_per_step=32")[0]["error"]
    assert "3 ranks share a step of 2 sequences" in text
