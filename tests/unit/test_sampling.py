"""One token from a distribution: the library's filters are the reference."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer.evaluate.sampling import Sampling, choose

DRAWS = 4000


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores = logits[None].double()
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, scores)[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=0.5, top_p=1.0), Sampling(temperature=1.0, top_k=3, top_p=1.0),
        Sampling(temperature=1.3, top_p=0.7), Sampling(temperature=0.9, top_k=5, top_p=0.8),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_the_librarys_filters(sampling) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(DRAWS)]), minlength=12)
    expected = reference(logits, sampling)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    # Five standard deviations of a binomial share.
    assert ((counts / DRAWS - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all()


def test_temperature_zero_and_top_k_one_take_the_likeliest_and_zero_draws_nothing() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert choose(logits, Sampling(temperature=0), generator) == 1
    assert torch.equal(generator.get_state(), state)
    assert choose(logits, Sampling(top_k=1), generator) == 1
    assert choose(logits, Sampling(top_p=1e-9), generator) == 1
