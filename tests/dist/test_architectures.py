"""Every architecture: initialized, sharded on two ranks, trained, exported, read again; and what else it runs with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import bodies_models as bodies
from tests.dist.test_run import CONFIG
from tests.models import ARCHITECTURES
from trainer.checkpoint.export import export
from trainer.checkpoint.manifest import generations, pick, verify

ROOT = Path(__file__).parents[2]
STEPS = "--train.length=4 steps"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    words = "the of sea light runs over under seven stones while green birds sing and nobody hears it".split()
    lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + f" {i}." for i in range(40)]
    (folder / "corpus.txt").write_text("\n\n".join(lines))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def slug(name: str) -> str:
    return name.replace(", ", "-")


@pytest.fixture(scope="module")
def trained(group, place):
    """The run of an architecture on two ranks, once for all tests."""
    known = {}

    def run(name: str):
        if name not in known:
            overrides = (f"--name={slug(name)}", STEPS, "--optim.lr=0.02")
            known[name] = group(2, bodies.train, str(place / "run.yaml"), name, *overrides)[0]
        return known[name]

    return run


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_and_its_export_gives_the_same_logits(name, trained, place) -> None:
    result = trained(name)
    assert result["outcome"] == "finished"
    assert all(0 < loss < 7 for loss in result["loss"])
    assert result["loss"][-1] < result["loss"][0]
    run = place / "runs" / slug(name)
    target = run / "export" / "last"
    assert export(run, *pick(run), target) == 0.0
    assert bodies.logits_of(str(target)).isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunks_of_the_loss_change_it_by_rounding_only(name, trained, group, place) -> None:
    overrides = (f"--name={slug(name)}-chunks", STEPS, "--optim.lr=0.02", "--train.loss_chunk=5")
    result = group(2, bodies.train, str(place / "run.yaml"), name, *overrides)[0]
    norms = [r["history"][0]["gradient_norm"] for r in (result, trained(name))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    # AdamW turns rounding of gradients near zero into full steps, hence not closer after the first.
    assert result["loss"][0] == pytest.approx(trained(name)["loss"][0], rel=1e-6)
    assert result["loss"] == pytest.approx(trained(name)["loss"], rel=1e-3)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2, tied", "mixtral"])
def test_checkpointing_of_activations_changes_no_bit(name, mode, trained, group, place) -> None:
    overrides = (f"--name={slug(name)}-{mode}", STEPS, "--optim.lr=0.02", f"--train.activation_checkpointing={mode}")
    result = group(2, bodies.train, str(place / "run.yaml"), name, *overrides)[0]
    assert result["tensors"] == trained(name)["tensors"]


def test_compiled_blocks_train_alike(trained, group, place) -> None:
    options = ("--train.loss_chunk=7", "--train.activation_checkpointing=selective", STEPS, "--optim.lr=0.02")
    result = group(2, bodies.compiled, str(place / "run.yaml"), "--name=compiled", *options)[0]
    assert result["loss"] == pytest.approx(trained("llama")["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_go_to_the_matrix_rule_and_routers_to_adamw(name, group, place) -> None:
    found = group(2, bodies.groups_of, str(place / "run.yaml"), name)[0]
    experts = [key for key in found["matrices"] if ".experts." in key]
    assert {key.rpartition(".")[2] for key in experts} == {"gate_up_proj", "down_proj"}
    routers = [key for key in found["embeddings"] if ".gate." in key or ".router." in key]
    layers = 1 if name == "qwen3_moe" else 2
    assert (len(experts), len(routers)) == (2 * layers, layers)
    assert not [key for key in found["matrices"] if "bias" in key or "gate.weight" in key or "router" in key]


def test_mixtures_train_in_bf16_under_both_strategies(trained, group, place) -> None:
    for world, strategy in ((1, "single"), (2, "fsdp2")):
        overrides = (f"--name=bf16-{strategy}", STEPS, "--train.precision=bf16", f"--parallel.name={strategy}")
        result = group(world, bodies.train, str(place / "run.yaml"), "mixtral", *overrides, "--train.loss_chunk=5")[0]
        assert result["loss"][0] == pytest.approx(trained("mixtral")["loss"][0], abs=0.05)


def test_the_documentation_lists_what_is_tested() -> None:
    text = (ROOT / "docs/models.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and line.count("|") == 7]
    assert set(ARCHITECTURES) <= set(rows)


def test_a_model_that_sees_the_future_is_refused(group, place) -> None:
    config = "{model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48%s}"
    answers = []
    for name, more in (("both", ""), ("past", ", is_decoder: true")):
        overrides = [f"--name=bert-{name}", f"--model.config={config % more}"]
        answers.append(group(2, bodies.start, str(place / "run.yaml"), overrides)[0])
    assert "bert sees later tokens" in answers[0]["error"]
    assert "is_decoder: true" in answers[0]["error"]
    assert answers[1]["step"] == 0


def test_an_architecture_that_says_nothing_of_a_weight_is_refused(group, place) -> None:
    config = "{model_type: apertus, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4, intermediate_size: 48}"
    answer = group(2, bodies.start, str(place / "run.yaml"), ["--name=apertus", f"--model.config={config}"])[0]
    assert "apertus does not say in transformers how model.layers.0.mlp.act_fn" in answer["error"]


# Continued pretraining.


@pytest.fixture(scope="module")
def exported(trained, place) -> dict[str, Path]:
    """Folders to start from, all with the same weights: an export, the run, its checkpoint."""
    trained("llama, tied")
    run = place / "runs/llama-tied"
    target = run / "export" / "source"
    export(run, *pick(run), target)
    return {"export": target, "run": run, "checkpoint": generations(run / "checkpoints")[0]}


def started(group, place, world: int, name: str, source: Path | str, *more: str):
    overrides = [f"--name={name}", "--model.config={}", f"--model.init_from={source}", *more]
    if not any("tokenizer" in option for option in more):
        overrides.append(f"--data.tokenizer.path={place}/runs/llama-tied/tokenizer")
    return group(world, bodies.start, str(place / "run.yaml"), overrides)[0]


@pytest.mark.parametrize("kind", ["export", "run", "checkpoint"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_starts_from_weights_to_the_bit(kind, world, exported, trained, group, place) -> None:
    answer = started(group, place, world, f"from-{kind}-{world}", exported[kind])
    expected = {k: v for k, v in trained("llama, tied")["tensors"].items() if k.startswith("model.")}
    assert answer["tensors"] == expected
    assert answer["architecture"]["model_type"] == "llama"
    assert str(exported["checkpoint" if kind != "export" else "export"]) == answer["lineage"]["init_from"]


@pytest.mark.parametrize("name", ["gpt2", "gemma2, tied", "mixtral", "gpt_oss"])
def test_exports_of_other_architectures_come_back_to_the_bit(name, trained, group, place) -> None:
    result = trained(name)
    run = place / "runs" / slug(name)
    target = run / "export" / "again"
    export(run, *pick(run), target)
    answer = started(group, place, 2, f"again-{slug(name)}", target)
    assert answer["tensors"] == {k: v for k, v in result["tensors"].items() if k.startswith("model.")}


def test_a_resume_goes_on_from_its_own_checkpoint_when_the_source_is_gone(exported, group, place, tmp_path) -> None:
    source = tmp_path / "source"
    export(exported["run"], exported["checkpoint"], verify(exported["checkpoint"]), source)
    overrides = ["--name=gone", "--model.config={}", f"--model.init_from={source}", f"--data.tokenizer.path={source}", STEPS]
    from tests.dist import bodies_run

    path = str(place / "run.yaml")
    first = group(2, bodies_run.train, path, overrides, 2)[0]
    assert first["outcome"] == "preempted"
    (source / "config.json").unlink()
    second = group(2, bodies_run.train, path, overrides)[0]
    assert (second["started"], second["outcome"]) == (2, "finished")
    run = place / "runs/gone"
    assert export(run, *pick(run), run / "export" / "last") == 0.0


def test_what_does_not_fit_the_weights_is_refused(exported, trained, group, place, tmp_path) -> None:
    trained("llama")
    other = f"--data.tokenizer.path={tmp_path}/tokenizer"
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(place / "runs/llama-tied/tokenizer/tokenizer.json"))
    text = tokenizer.to_str().replace('"!":', '"\u00ff!":', 1)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token="<|bos|>", eos_token="<|eos|>"
    ).save_pretrained(tmp_path / "tokenizer")
    cases = {
        "vocabulary": (exported["run"], other, "tokenizer is not that of the weights"),
        "shape": (exported["export"], "--model.config={intermediate_size: 40}", "of another shape"),
        "shape-2": (exported["checkpoint"], "--model.config={intermediate_size: 40}", "in the checkpoint"),
        "kind": (exported["export"], "--model.config={model_type: mistral}", "of another architecture"),
        "nothing": (place, "--seed=0", "there are no weights"),
        "typo": (exported["export"], "--model.config={hiden_size: 32}", "did you mean hidden_size"),
    }
    for name, (source, more, words) in cases.items():
        try:
            answer = started(group, place, 2, f"bad-{name}", source, more)["error"]
        except AssertionError as error:  # found before the ranks have a folder
            answer = str(error)
        assert words in answer, (name, answer)


def test_a_damaged_checkpoint_is_no_source(exported, group, place, tmp_path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(exported["run"], copy)
    newest = generations(copy / "checkpoints")[0]
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert "damaged" in started(group, place, 2, "damaged", newest)["error"]


# The largest micro-batch that fits.


@pytest.fixture(scope="module")
def ample(group, place):
    """Two sequences per micro-step, as configured, on two ranks: 8 sequences per step."""
    return group(2, bodies.train, str(place / "run.yaml"), "llama", "--name=ample", STEPS, "--train.micro_batch_size=2")[0]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("more", [[], ["--parallel.reshard_after_forward=false", "--train.activation_checkpointing=full"]])
def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(where, more, ample, group, place) -> None:
    name = f"short-{where}-{len(more)}"
    overrides = [STEPS, f"--model.config={ARCHITECTURES['llama']!r}", *more]
    results = group(2, bodies.short_of_memory, str(place / "run.yaml"), name, where, 2, overrides)
    assert [result["outcome"] for result in results] == ["finished", "finished"]
    assert results[0]["said"] == ["rank 1 ran out of memory with 4 sequences per micro-step; trying 2"]
    # The same rows in the same micro-steps as with the number given: the same to the bit.
    assert results[0]["tensors"] == ample["tensors"]
    events = (place / "runs" / name / "events.jsonl").read_text()
    assert '"micro batch"' in events


def test_with_memory_enough_a_rank_takes_its_whole_share_and_the_update_is_the_same(ample, group, place) -> None:
    overrides = [STEPS, f"--model.config={ARCHITECTURES['llama']!r}"]
    result = group(2, bodies.short_of_memory, str(place / "run.yaml"), "enough", "never", 0, overrides)[0]
    assert result["said"] == []
    assert max(result["rows"]) == 4
    assert result["loss"] == pytest.approx(ample["loss"], rel=1e-5)


def test_not_one_sequence_fits(group, place) -> None:
    overrides = [STEPS, f"--model.config={ARCHITECTURES['llama']!r}"]
    for result in group(2, bodies.short_of_memory, str(place / "run.yaml"), "none", "backward", 0, overrides):
        assert "rank 1 ran out of memory with one sequence" in result["error"]
        assert "train.loss_chunk" in result["error"]


def test_another_error_is_not_taken_for_it(group, place) -> None:
    assert group(1, bodies.bug_in_rehearsal, str(place / "run.yaml")) == ["another error"]


def test_auto_in_one_process(group, place) -> None:
    overrides = [STEPS, f"--model.config={ARCHITECTURES['llama']!r}", "--parallel.name=single"]
    result = group(1, bodies.short_of_memory, str(place / "run.yaml"), "auto-single", "backward", 3, overrides)[0]
    assert [text.split("; ")[1] for text in result["said"]] == ["trying 4", "trying 2"]
    assert result["outcome"] == "finished"
    assert torch.tensor(result["loss"]).isfinite().all()
