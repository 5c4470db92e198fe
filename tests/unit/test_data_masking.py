"""Documents kept apart: borders in packed rows, positions, targets at borders, and models that leak are refused."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.data.batches import MASKED, Batches
from trainer.data.masking import Borders, crossing, position_ids
from trainer.model.documents import check_documents_apart
from trainer.model.loss import summed_loss
from trainer.outcome import RunError

BOTH, ONLY_BOS, ONLY_EOS, SAME = Borders(1, 2), Borders(1, None), Borders(None, 2), Borders(3, 3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=5, max_size=12),  # of two tokens at least: some are left after the cut
    st.integers(0, 8),
    st.sampled_from([BOTH, ONLY_BOS, ONLY_EOS, SAME]),
)
def test_positions_count_from_the_beginning_of_each_document(lengths, cut, borders) -> None:
    """A stream of documents, cut anywhere as a row is: the definition, token by token, is the reference."""
    stream, expected, crosses = [], [], []
    for number, length in enumerate(lengths):
        document = ([] if borders.bos is None else [borders.bos]) + [10] * length
        document += [] if borders.eos is None else [borders.eos]
        stream += document
        places = list(range(len(document)))
        if borders.bos is None:  # the EOS before is the beginning; the first document of the stream has none
            shift = 0 if number == 0 else 1
            places = [place + shift for place in places]
            places[-1] = 0
        expected += places
        crosses += [False] * (len(document) - 1) + [borders.bos is not None and borders.eos is not None]
    stream, expected, crosses = stream[cut:], expected[cut:], crosses[cut:]
    row = 0
    while row < len(expected) and (row == 0 or expected[row] != 0):  # the cut document counts from the row's start
        expected[row] = row
        row += 1
    tokens = np.array([stream])
    assert position_ids(tokens, borders)[0].tolist() == expected
    assert crossing(tokens, borders)[0].tolist() == crosses[:-1]


class Rows:
    """Two rows of 7 tokens."""

    def rows(self, positions):
        rows = np.array([[10, 11, 2, 1, 12, 2, 1], [1, 13, 14, 15, 2, 1, 16]])
        return rows[positions], np.array([1, 1])[positions]

    def bytes(self, positions):
        return np.array([1, 1])[positions]


def test_batches_carry_positions_and_leave_out_targets_across_borders() -> None:
    (batch,) = Batches(Rows(), 0, 1, 2, 1, BOTH).at(0, 2)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert batch.targets.tolist() == [[11, 2, MASKED, 12, 2, MASKED], [13, 14, 15, 2, MASKED, 16]]
    (plain,) = Batches(Rows(), 0, 1, 2, 1).at(0, 2)
    assert plain.positions is None
    assert MASKED not in plain.targets
    _, short = Batches(Rows(), 0, 1, 1, 2, BOTH).at(0, 1)
    assert (short.targets == MASKED).all()
    assert short.positions.shape == (1, 6)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
APART = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "mistral": SMALL | {"sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": 8},
    "gpt2": GPT2,
    "qwen3_moe": SMALL | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
}
LEAKS = {
    "opt": {k: v for k, v in SMALL.items() if "inter" not in k and "key" not in k}
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},  # makes itself a mask of ones
    "bloom": OTHER,  # ALiBi over the whole row
    "falcon": SMALL,
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # state runs on
}


def model(kind, options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=torch.float32)


def check(model, context=None):
    check_documents_apart(model, 60, 48, context or nullcontext(), torch.device("cpu"))


@pytest.mark.parametrize("kind", APART)
def test_architectures_that_follow_positions_pass_and_are_left_as_they_were(kind) -> None:
    tried = model(kind, APART[kind]).train()
    state = torch.random.get_rng_state()
    check(tried)
    with torch.autocast("cpu", torch.bfloat16):
        check(tried)
    assert tried.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", LEAKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_architectures_that_leak_are_refused(kind, precision) -> None:
    with pytest.raises(RunError) as caught:
        check(model(kind, LEAKS[kind]), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"))
    assert f"{kind} does not keep documents apart" in caught.value.what
    assert "changes the logits of a later one" in caught.value.what
    assert "data.document_masking" in caught.value.mend


class Wrapped(torch.nn.Module):
    """A sound model called in one of the ways that let it leak."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = model("llama", SMALL), way

    def forward(self, input_ids, position_ids=None, use_cache=None):
        extra = {} if self.way == "ignores positions" else {"position_ids": position_ids}
        if self.way == "attention mask":
            extra["attention_mask"] = torch.ones_like(input_ids)
        answer = self.inner(input_ids=input_ids, use_cache=self.way == "cache", **extra)
        if self.way == "constant":
            answer.logits = answer.logits * 0
        if self.way == "only the first row":
            row = self.inner(input_ids=input_ids, position_ids=position_ids[:1].expand_as(input_ids), use_cache=False)
            return row
        return answer


@pytest.mark.parametrize("way", ["ignores positions", "attention mask", "cache", "constant", "only the first row"])
def test_every_silent_way_to_leak_is_found(way) -> None:
    with pytest.raises(RunError, match="nothing can be proven" if way == "constant" else "changes the logits"):
        check(Wrapped(way))
    check(Wrapped("sound"))


def test_a_model_without_position_ids_is_refused() -> None:
    class Blind(torch.nn.Module):
        def forward(self, input_ids, use_cache=None):
            raise AssertionError

    with pytest.raises(RunError, match="takes no position ids"):
        check(Blind())
    with pytest.raises(RunError, match="sequences of 4 tokens"):
        check_documents_apart(Blind(), 60, 4, nullcontext(), torch.device("cpu"))


def test_the_loss_of_packed_documents_is_the_sum_of_their_own() -> None:
    """Each document alone, from position 0, is the reference: values and gradients."""
    tried = model("llama", SMALL).double()
    documents = [[1, *np.random.default_rng(i).integers(3, 60, n).tolist(), 2] for i, n in enumerate((9, 4, 12))]
    tokens = np.array([[token for document in documents for token in document]])

    class Packed(Rows):
        def rows(self, positions):
            return tokens[positions], np.array([1])[positions]

    (batch,) = Batches(Packed(), 0, 1, 1, 1, BOTH).at(0, 1)
    packed = summed_loss(tried, *batch)
    packed.backward()
    gradients = [p.grad.clone() for p in tried.parameters()]
    tried.zero_grad()
    alone = sum(summed_loss(tried, torch.tensor([d[:-1]]), torch.tensor([d[1:]])) for d in documents)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)  # the loss is fp32
    for gradient, parameter in zip(gradients, tried.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)
    unmasked = summed_loss(tried, batch.inputs, batch.targets)
    assert abs(unmasked.item() - alone.item()) > 1e-3
