"""Proof at the start of a run that the model keeps packed documents apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.model.loss import model_inputs
from trainer.outcome import RunError

LENGTH = 64  # tokens of a row of the test; attention windows are cut in documents of their own, so longer shows no more
NOISE = 4.0  # times the change of rows in which nothing changed


@torch.no_grad()
def check_documents_apart(model: Any, vocab_size: int, max_length: int, context: Any, device: torch.device) -> None:
    """Change the tokens of one document and refuse the model if the logits of a later one in the same row change.

    Rows 0 and 1 hold two and three documents with borders at different places, and the first, or the second, changes.
    Rows 2 and 3 hold the same documents and stay as they are: their logits change not at all in a dense model, and by
    rounding where experts are batched over rows; that much is allowed to the unchanged documents too. All ranks call
    this together; it draws from no random generator that the run uses.

    Raises:
        RunError: the logits of another document changed, the changed document's own did not (then nothing is proven), or
            the model takes no position ids.
    """
    length = min(LENGTH, max_length)
    if length < 6:
        raise RunError(
            f"documents cannot be told apart in sequences of {length} tokens",
            where="data.document_masking",
            mend="use a data.sequence_length of at least 6",
        )
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(vocab_size, (2, length), generator=generator).repeat(2, 1)  # (4, length)
    after = before.clone()
    positions, changed, others = _layout(length)
    other_ids = (before + 1 + torch.randint(max(vocab_size - 1, 1), before.shape, generator=generator)) % vocab_size
    after[changed] = other_ids[changed]
    training = model.training
    model.eval()
    # Compiled blocks would specialize on this shape, which no step has.
    with torch.compiler.set_stance("force_eager"), context:
        try:
            logits = [model(**model_inputs(ids.to(device), positions.to(device))).logits for ids in (before, after)]
        except TypeError as error:
            raise _refused(model, f"it takes no position ids ({error})") from None
    model.train(training)
    moved = (logits[0].float() - logits[1].float()).abs().amax(dim=-1).cpu()  # (4, length)
    own, leak, noise = float(moved[changed].max()), float(moved[others].max()), float(moved[2:].max())
    if not own > NOISE * noise:
        raise _refused(
            model, f"a changed document does not change its own logits ({own:.3g}), so nothing can be proven"
        )
    if not leak <= NOISE * noise:
        raise _refused(
            model, f"another document changes the logits of a later one by up to {leak:.3g} (its own by {own:.3g})"
        )


def _layout(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Position ids (4, length), which tokens change, and which tokens of the same rows must not notice."""
    third, half = length // 3, length // 2
    positions = torch.arange(length).repeat(4, 1)
    changed, others = torch.zeros(4, length, dtype=torch.bool), torch.zeros(4, length, dtype=torch.bool)
    for row in (0, 2):
        positions[row, half:] -= half
    for row in (1, 3):
        positions[row, third:] -= third
        positions[row, 2 * third :] -= third
    changed[0, :half], others[0, half:] = True, True
    changed[1, third : 2 * third] = True
    others[1, :third], others[1, 2 * third :] = True, True
    return positions, changed, others


def _refused(model: Any, why: str) -> RunError:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return RunError(
        f"{kind} does not keep documents apart: {why}",
        where="data.document_masking, model.config.model_type",
        mend="set data.document_masking to false, or use an architecture whose attention follows position ids, such as llama",
    )
