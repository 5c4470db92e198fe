"""What each way of checkpointing saves and computes again, counted; and compilation per block."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.memory import Count
from tests.models import batch, tiny
from trainer.config import TrainConfig
from trainer.model.activations import SAVED
from trainer.model.loss import losses
from trainer.model.prepare import check_compiler, prepare
from trainer.outcome import RunError

LAYERS, PRODUCTS = 2, 7  # of a Llama block: q, k, v, o, gate, up, down
PRODUCT_NAMES = {"mm", "addmm", "bmm", "baddbmm"}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def train(**options) -> TrainConfig:
    return TrainConfig(length="1 steps", tokens_per_step=16, **options)


def counted(mode: str, name: str = "llama", **changes):
    """(forward and backward counted, bytes that wait for the backward, gradients)."""
    model = tiny(name, **changes)
    prepare(model, train(activation_checkpointing=mode), torch.device("cpu"))
    inputs, targets = batch(4, 16)
    with Count() as count:
        objective = losses(model, inputs, targets)[1]
        waiting = count.live
        objective.backward()
    return count.operations, waiting, {n: p.grad for n, p in model.named_parameters()}


def products(operations) -> int:
    return sum(operations[name] for name in PRODUCT_NAMES)


def test_what_is_computed_again_is_counted() -> None:
    none, full, selective = (counted(mode)[0] for mode in ("none", "full", "selective"))
    # Forward once, backward twice; nothing for the gradient of the token ids.
    assert products(none) == 3 * (LAYERS * PRODUCTS + 1)
    assert (none[ATTENTION], none["silu"]) == (LAYERS, LAYERS)
    # All but the last product of a block, whose result nothing of the block's backward needs.
    assert products(full) - products(none) == LAYERS * (PRODUCTS - 1)
    assert (full[ATTENTION], full["silu"]) == (2 * LAYERS, 2 * LAYERS)
    # Selective: no product and no attention again, all the rest.
    assert products(selective) == products(none)
    assert (selective[ATTENTION], selective["silu"]) == (LAYERS, 2 * LAYERS)
    assert selective["rsqrt"] == full["rsqrt"] == none["rsqrt"] + 2 * LAYERS


def test_fewer_bytes_wait_for_the_backward() -> None:
    none, full, selective = (counted(mode)[1] for mode in ("none", "full", "selective"))
    assert full < selective < none
    deeper = [counted(mode, num_hidden_layers=6)[1] for mode in ("full", "selective", "none")]
    per_layer = [(b - a) / 4 for a, b in zip((full, selective, none), deeper, strict=True)]
    # Numbers per token, as in the documentation; with `full` a block's input and nothing else.
    assert [count / 4 / 64 for count in per_layer] == [32, 292, 486]


@pytest.mark.parametrize("name", ["llama", "gpt2, tied", "gemma2, tied", "mixtral"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_bit_equal(name, mode) -> None:
    """With dropout too: GPT-2 has it by default, and the model trains."""
    results = []
    for how in ("none", mode):
        torch.manual_seed(1)
        results.append(counted(how, name)[2])
    assert all(torch.equal(gradient, results[1][key]) for key, gradient in results[0].items())


def test_the_saved_operations_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    listed = {word for word in text.split("`") if word.startswith("aten.")}
    assert listed == {str(operation).removesuffix(".default") for operation in SAVED}


def compiled_and_plain(mode: str):
    """(loss, gradients) of a model of more blocks than dynamo's limit of recompilations, plain and compiled."""
    from torch._dynamo.utils import counters

    inputs, targets = batch(4, 16)
    results = []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = tiny("llama", num_hidden_layers=10)
        prepare(model, train(compile=compile, activation_checkpointing=mode), torch.device("cpu"))
        loss, objective = losses(model, inputs, targets)
        objective.backward()
        results.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}))
    assert (counters["stats"]["unique_graphs"], len(counters["graph_break"])) == (1, 0)
    return results


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_blocks_give_the_same_loss() -> None:
    """Forward only: a backward takes the C++ compiler twice as long."""
    torch._dynamo.reset()
    inputs, targets = batch(4, 16)
    with torch.no_grad():
        plain, compiled = tiny("llama"), tiny("llama")
        prepare(compiled, train(compile=True), torch.device("cpu"))
        assert float(losses(compiled, inputs, targets)[0]) == pytest.approx(
            float(losses(plain, inputs, targets)[0]), rel=1e-6
        )
    assert dict(compiled.named_parameters()).keys() == dict(plain.named_parameters()).keys()


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_all_blocks_share_one_graph_and_checkpointing_is_within(mode, monkeypatch) -> None:
    """By the tracing half of the compiler alone, which needs no C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (loss, gradients), (compiled, others) = compiled_and_plain(mode)
    assert compiled == pytest.approx(loss, rel=1e-6)
    assert all((g - others[key]).abs().max() <= 1e-5 * g.abs().max() for key, g in gradients.items())


def test_without_a_compiler_the_run_is_refused(monkeypatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(RunError, match="needs a C\\+\\+ compiler") as error:
        check_compiler(torch.device("cpu"))
    assert "/nowhere/g++" in error.value.what
    assert "train.compile: false" in error.value.mend


def test_an_architecture_without_blocks_is_refused() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList()
    model._no_split_modules = None
    with pytest.raises(RunError, match="names no blocks"):
        prepare(model, train(activation_checkpointing="full"), torch.device("cpu"))
