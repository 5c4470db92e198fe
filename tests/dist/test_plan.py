"""`orthogon plan` against what ranks hold and send: every figure within a tenth."""

from __future__ import annotations

import json

import pytest

from launch.plan import Machine, plan
from tests.dist import bodies_plan as bodies
from trainer import config as configuration
from trainer.model.footprint import footprint

TINY = "{model_type: llama, hidden_size: 48, intermediate_size: 80, num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2}"
SMALL = "{model_type: qwen3, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 6, num_key_value_heads: 3, head_dim: 32, tie_word_embeddings: true}"
GPT2 = "{model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 4}"
# Ranks, model, strategy, optimizer, further options.
CASES = [
    (1, TINY, "{name: fsdp2}", "normuon", ""),
    (2, TINY, "{name: fsdp2}", "normuon", ""),
    (2, TINY, "{name: fsdp2, reshard_after_forward: false, sync_every_micro_step: false}", "adamw", ""),
    (2, TINY, "{name: ddp}", "adamw", "--train.activation_checkpointing=full"),
    (2, SMALL, "{name: fsdp2}", "normuon", "--train.precision=bf16"),
    (2, TINY, "{name: ddp}", "muon", "--train.precision=bf16"),
    (2, GPT2, "{name: fsdp2}", "normuon", "--train.activation_checkpointing=full"),
    (4, TINY, "{name: fsdp2, replicate: 2, spread_replicas: true}", "normuon", ""),
    (2, TINY, "{name: fsdp2}", "root", ""),
    (2, TINY, "{name: fsdp2}", "auon", ""),
    (2, TINY, "{name: fsdp2}", "trion", ""),
    (2, GPT2, "{name: fsdp2}", "dct_adamw", ""),
]  # fmt: skip
YAML = """\
name: t
data: {path: stdlib, tokenizer: {vocab_size: 509}, sequence_length: 64}
train: {length: 10 steps, tokens_per_step: 1024, micro_batch_size: 2}
"""


def both(group, folder, world, model, parallel, optimizer, more):  # type: ignore[no-untyped-def]
    """(the plan, what the fullest rank held, the mean of what was sent)"""
    path = folder / "run.yaml"
    polar = ", polar_dtype: fp32" if optimizer in ("normuon", "muon", "root") else ""
    path.write_text(
        f"{YAML}model: {{config: {model}}}\nparallel: {parallel}\noptim: {{name: {optimizer}{polar}}}\nruns: {folder}/runs\n"
    )
    overrides = [more] if more else []
    config = configuration.load(path, overrides)
    found = plan(config, Machine(per_node=world), footprint)
    step = found["step"]
    ranks = group(world, bodies.measured, str(path), overrides, step["rows"], step["micro steps"])
    held = {key: max(rank[key] for rank in ranks) for key in ("weights", "gradients", "optimizer state", "activations")}
    sent = {key: sum(rank[key] for rank in ranks) / world for key in ranks[0].keys() - held.keys()}
    return found, held, sent


@pytest.mark.parametrize("world, model, parallel, optimizer, more", CASES)
def test_a_plan_tells_what_ranks_hold_and_send(world, model, parallel, optimizer, more, group, tmp_path) -> None:
    found, held, sent = both(group, tmp_path, world, model, parallel, optimizer, more)
    planned = found["memory"]["bytes"]
    for key, value in held.items():
        assert planned[key] == pytest.approx(value, rel=0.1), key
    assert found["memory"]["unknown"] == ""
    for key, value in sent.items():
        assert found["wire"]["bytes sent"].get(key, 0) == pytest.approx(value, rel=0.1), key
    print(json.dumps({"planned": planned, "held": held, "wire": found["wire"]["bytes sent"], "sent": sent}))
