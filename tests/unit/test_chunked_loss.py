"""The loss in chunks of tokens is the model's own loss, gradients too, without a tensor of tokens x vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests.memory import Count
from tests.models import ARCHITECTURES, batch, tiny
from trainer.model import chunked
from trainer.model.loss import losses, summed_loss
from trainer.outcome import RunError


def outcome(model, inputs, targets):
    """Loss, objective, and the gradients of the objective by name."""
    model.zero_grad()
    loss, objective = losses(model, inputs, targets)
    objective.backward()
    return (
        loss.detach(),
        objective.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


def large(model):
    """Weights so large that soft-capping, scaling and masks matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    model.set_experts_implementation("eager")  # the grouped products know no float64
    return model.eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_plain_loss(name, dtype, bound) -> None:
    model = large(tiny(name)).to(dtype)
    inputs, targets = batch(3, 16)
    plain = outcome(model, inputs, targets)
    assert plain[0].dtype == dtype
    for chunk in (1, 7, 48) if dtype == torch.float64 else (7,):
        (chunked.install if chunk == 1 or dtype == torch.float32 else lambda m, c: setattr(m, "loss_chunk", c))(
            model, chunk
        )
        loss, objective, gradients = outcome(model, inputs, targets)
        assert abs(loss - plain[0]) <= bound * plain[0]
        assert abs(objective - plain[1]) <= bound * plain[1]
        assert gradients.keys() == plain[2].keys()
        for key, gradient in gradients.items():  # some are zero but for rounding, such as those of biases of keys
            assert (gradient - plain[2][key]).abs().max() <= bound * plain[2][key].abs().max().clamp_min(1e-2), key
        with torch.no_grad():
            assert abs(summed_loss(model, inputs, targets) - plain[0]) <= bound * plain[0]


def test_soft_capping_and_balance_are_part_of_what_is_compared() -> None:
    """Negative control: without them the loss is another one."""
    inputs, targets = batch(3, 16)
    capped, bare = (
        summed_loss(large(tiny("gemma2, tied", final_logit_softcapping=c)), inputs, targets) for c in (2.0, None)
    )
    assert abs(capped - bare) > 0.001 * bare
    loss, objective, _ = outcome(large(tiny("mixtral")), inputs, targets)
    assert objective > loss


def test_in_bf16_chunks_lose_no_precision() -> None:
    """Against float64, gradients err at most as much as those of the plain loss in bf16."""
    inputs, targets = batch(4, 16)
    exact = outcome(tiny("llama").double(), inputs, targets)[2]
    errors = []
    for chunk in (None, 4):
        model = tiny("llama").bfloat16()
        if chunk:
            chunked.install(model, chunk)
        gradients = outcome(model, inputs, targets)[2]
        errors.append({k: float((gradients[k].double() - exact[k]).norm() / exact[k].norm()) for k in exact})
    assert all(errors[1][key] <= 1.1 * errors[0][key] + 1e-4 for key in exact)


def test_peak_of_living_bytes_is_below_a_third_at_a_vocabulary_of_32k() -> None:
    vocabulary, tokens = 32768, 1024
    inputs, targets = batch(2, tokens // 2, vocabulary)
    counts = []
    for chunk in (None, 64):
        model = tiny("llama", vocabulary=vocabulary, length=tokens // 2)
        if chunk:
            chunked.install(model, chunk)
        with Count() as count:
            losses(model, inputs, targets)[1].backward()
        counts.append(count)
    plain, chunks = counts
    assert plain.largest == 4 * tokens * vocabulary
    assert chunks.largest <= 4 * 64 * vocabulary
    assert chunks.peak <= 0.3 * plain.peak


def test_a_decoder_that_is_not_apart_is_refused() -> None:
    model = tiny("llama")
    model.get_decoder = lambda: model
    model.base_model_prefix = "none"
    model._modules["body"] = model._modules.pop("model")
    with pytest.raises(RunError, match="does not keep its decoder apart"):
        chunked.install(model, 8)
