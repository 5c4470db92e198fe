"""Every strategy as the tests run it: (ranks, override of the configuration)."""

from __future__ import annotations

import importlib.util

import torch

from trainer.model.prepare import check_compiler
from trainer.outcome import RunError


def _no_compiler() -> str:
    try:
        check_compiler(torch.device("cpu"))
    except RunError as error:
        return error.what
    return ""


NO_COMPILER = _no_compiler()
"""Why nothing can be compiled here; empty if it can."""
ABSENT = importlib.util.find_spec("deepspeed") is None
REASON = "the extra is absent: pip install 'orthogon[deepspeed]'"

TORCH = {
    "single": (1, "--parallel={name: single}"),
    "ddp": (2, "--parallel={name: ddp}"),
    "fsdp2": (2, "--parallel={name: fsdp2}"),
    "fsdp2, replicate: 2": (4, "--parallel={name: fsdp2, replicate: 2}"),
}
ZERO = {
    "deepspeed, stage: 1": (2, "--parallel={name: deepspeed, stage: 1}"),
    "deepspeed, stage: 2": (2, "--parallel={name: deepspeed, stage: 2}"),
    "deepspeed, stage: 3": (2, "--parallel={name: deepspeed, stage: 3}"),
    "deepspeed, stage: 2, offload": (2, "--parallel={name: deepspeed, stage: 2, offload_optimizer: true}"),
    "deepspeed, stage: 3, offload": (
        2,
        "--parallel={name: deepspeed, stage: 3, offload_optimizer: true, offload_parameters: true}",
    ),
}
STRATEGIES = TORCH | ZERO
# Saved in the middle and resumed, compared to the bit with a run that was not; test_run.py does it for fsdp2, at many steps.
RESUMED = [name for name in STRATEGIES if name != "fsdp2"]
# One run after the other goes through these, each from the checkpoint of the one before.
CHAIN = [
    (1, 2, "single"), (2, 4, "ddp"), (4, 6, "fsdp2, replicate: 2"), (3, 7, "ddp"), (2, None, "fsdp2"),
]  # fmt: skip
ZERO_CHAIN = [
    (2, 3, "fsdp2"), (2, 4, "deepspeed, stage: 2"), (3, 5, "deepspeed, stage: 3"), (2, 6, "deepspeed, stage: 1"),
    (2, 7, "deepspeed, stage: 2, offload"), (2, 8, "deepspeed, stage: 3, offload"), (3, None, "ddp"),
]  # fmt: skip


def file_name(strategy: str) -> str:
    """The name as part of a run's name."""
    return "".join(c for c in strategy if c.isalnum())
