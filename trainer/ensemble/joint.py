"""An ensemble as one model that decodes: every member has a key-value cache of its own, and their logits become one.

All members are in memory at once. It stands where `trainer/evaluate/sampling.py` takes a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trainer import runfolder
from trainer.checkpoint.export import restored_model
from trainer.ensemble.manifest import RULES, Ensemble, open_members


def combined(logits: Sequence[Tensor], rule: str) -> Tensor:
    """The members' logits, each (..., V), as logits of the ensemble, in fp64.

    Fp64, so that the mean of K equal ones is each of them to the bit.

    Args:
        logits: of real tokens only: padded columns would take part in the probability mean.
        rule: one of `RULES`.
    """
    stacked = torch.stack([one.double() for one in logits])
    if rule == RULES[0]:
        return stacked.mean(0)
    return stacked.log_softmax(-1).logsumexp(0) - math.log(len(logits))


class Joint:
    """Members of one architecture that answer as one model.

    Args:
        vocab_size: tokens of the tokenizer; logits beyond are left out.
    """

    def __init__(self, members: Sequence[Any], rule: str, vocab_size: int) -> None:
        self.members, self.rule, self.vocab_size = list(members), rule, vocab_size
        self.config = self.members[0].config

        @functools.wraps(self.members[0].forward)
        def forward(**inputs: Any) -> SimpleNamespace:
            return self(**inputs)

        self.forward = forward
        """Takes what the members take, and says so."""

    def __call__(self, *, past_key_values: list[Any] | None = None, **inputs: Any) -> SimpleNamespace:
        caches = past_key_values or [None] * len(self.members)
        answers = [member(past_key_values=cache, **inputs) for member, cache in zip(self.members, caches, strict=True)]
        return SimpleNamespace(
            logits=combined([answer.logits[..., : self.vocab_size] for answer in answers], self.rule),
            past_key_values=[answer.past_key_values for answer in answers],
        )


def loaded(runs: Path, ensemble: Ensemble) -> tuple[Joint, int, torch.device]:
    """An ensemble that answers, of members that are verified.

    Returns:
        (model, most tokens that it takes, its device).

    Raises:
        RunError: as `manifest.open_members`.
    """
    found = open_members(runs, ensemble)
    config = runfolder.open_run(runs / ensemble.members[0].run)
    use_cuda = torch.cuda.is_available() and config.resources.device != "cpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    models = [
        restored_model(runs / member.run, path, one).to(device)
        for member, (path, one) in zip(ensemble.members, found, strict=True)
    ]
    room = getattr(models[0].config, "max_position_embeddings", config.data.sequence_length)
    return Joint(models, ensemble.rule, ensemble.vocab_size), room, device
