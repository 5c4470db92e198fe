"""The rules against float64 references, what they claim, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from trainer.optim import AdamW, NorMuon, ShardedOptimizer
from trainer.optim.groups import classify
from trainer.optim.plan import Stored, buckets, imbalance, own
from trainer.optim.polar import reference


def reference_normuon(w, gradients, lr, beta1, beta2, eps, scale, decay, nesterov):
    m, v = torch.zeros_like(w), torch.zeros(w.shape[0], 1, dtype=w.dtype)
    for g in gradients:
        m = beta1 * m + (1 - beta1) * g
        o = reference((beta1 * m + (1 - beta1) * g if nesterov else m)[None], "polar-express")[0]
        v = beta2 * v + (1 - beta2) * o.square().mean(1, keepdim=True)
        h = o / (v.sqrt() + eps)
        w = w - lr * decay * w - lr * scale * (w.numel() ** 0.5) / h.norm() * h
    return w, m, v


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_normuon_is_the_papers_algorithm(shape, nesterov) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    weight = nn.Parameter(start.clone())
    optimizer = NorMuon([weight], lr=0.1, weight_decay=0.3, polar_dtype="fp32", nesterov=nesterov)
    for gradient in gradients:
        weight.grad = gradient
        before = weight.detach().clone()
        optimizer.step()
        update = weight.detach() - (1 - 0.03) * before
        assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=1e-4)  # T7: exact RMS
    w, m, v = reference_normuon(
        start.double(), [g.double() for g in gradients], 0.1, 0.95, 0.95, 1e-8, 0.2, 0.3, nesterov
    )
    assert (weight - w).abs().max() < 1e-5
    assert (optimizer.state[weight]["momentum"] - m).abs().max() < 1e-6
    assert (optimizer.state[weight]["mean_square"] - v).abs().max() < 1e-6


def test_zero_and_missing_gradients_are_the_same_and_finite() -> None:
    weights = [nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    for weight, gradient in zip(weights, (torch.zeros(6, 4), None), strict=True):
        optimizer = NorMuon([weight], lr=0.1, weight_decay=0.5)
        weight.grad = gradient
        optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], torch.full((6, 4), 0.95))


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    mine = AdamW([ours], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(3, 4, generator=generator)
        mine.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_what_is_no_matrix_of_floats_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 2))
    for parameters, words in (
        ([], "no parameters"), ([{"params": []}], "no parameters"),
        ([("w", nn.Parameter(torch.zeros(0, 5)))], "w of shape .* has no entries"),
        ([("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))], "w is of torch.complex64"),
        ([("w", nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn)))], "w is of torch.float8_e4m3fn"),
        ([{"params": [("w", weight)], "blocks": [8, -4]}], "w has 4 rows"),
        ([{"params": [("w", weight)], "blocks": [3, 2]}], "w has 4 rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            NorMuon(parameters)
    with pytest.raises(TypeError, match="iterable"):
        NorMuon(weight)
    assert NorMuon([{"params": []}, {"params": [weight]}]).param_groups[1]["params"] == [weight]


def test_vectors_meta_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias .*takes matrices"):
        NorMuon([("bias", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="meta device"):
        NorMuon([nn.Parameter(torch.zeros(3, 3, device="meta"))])
    with pytest.raises(ValueError, match="no rule 'sgd'"):
        ShardedOptimizer([{"rule": "sgd", "params": [nn.Parameter(torch.zeros(2, 2))]}])
    with pytest.raises(ValueError, match="cannot be added later"):
        NorMuon([nn.Parameter(torch.zeros(2, 2))]).add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    with pytest.raises(ValueError, match="has no moment"):
        ShardedOptimizer([{"rule": "normuon", "moment": 1, "params": [nn.Parameter(torch.zeros(2, 2))]}])


@pytest.mark.parametrize("tied", [False, True])
def test_routing_claims_each_parameter_once_and_never_orthogonalizes_ends(tied) -> None:
    from trainer.config import ModelConfig
    from trainer.model.build import architecture, build

    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "tie_word_embeddings": tied}
    model = build(architecture(ModelConfig(config=config), vocab_size=64, bos=0, eos=1, max_length=16))
    matrices, embeddings, vectors = classify(model)
    assert len(matrices) == 14
    assert [name for name, _ in embeddings] == ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert all("norm" in name for name, _ in vectors)
    claimed = [p for part in (matrices, embeddings, vectors) for _, p in part]
    assert len(claimed) == len(set(claimed)) == len(list(model.parameters()))


def test_owners_of_llama_3_8b_are_balanced_at_128_ranks() -> None:
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    matrices = own([Stored((1, *shape), 1) for shape in layer * 32], 128)
    assert len(matrices) == 224
    assert imbalance(matrices, 128) <= 1.1
    in_turn = [dataclasses.replace(m, owner=i % 128) for i, m in enumerate(matrices)]
    assert imbalance(in_turn, 128) > 1.1  # what dealing them out in turn would give


def test_buckets_keep_their_limit_which_is_a_matrix_per_rank_at_least() -> None:
    def moved(parameters: list[Stored], chosen: list[list[int]], parts: int) -> list[int]:
        assert sorted(index for bucket in chosen for index in bucket) == list(range(len(parameters)))
        return [sum(2 * math.prod(parameters[i].shape) // parts for i in bucket) for bucket in chosen]

    plain = [Stored((1, 64, 32), 1)] * 40  # 4096 bytes each in bf16
    chosen = buckets(plain, 8, 2048, 2)
    assert moved(plain, chosen, 8) == [4096] * 5  # eight matrices of 512 bytes here, one for each rank
    assert moved(plain, buckets(plain, 8, 10_000, 2), 8) == [19 * 512, 19 * 512, 2 * 512]
    experts = [Stored((100, 64, 32), 2), *plain]  # one large parameter of small matrices is no measure for the others
    assert moved(experts, buckets(experts, 8, 2048, 2), 8)[1:] == [4096] * 5
