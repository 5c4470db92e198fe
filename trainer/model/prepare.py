"""What is done to a model between its building and its sharding: checkpointing, then compilation, block by block."""

from __future__ import annotations

import os
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.model import chunked
from trainer.model.activations import checkpointed
from trainer.model.build import blocks
from trainer.outcome import RunError


def prepare(model: Any, train: TrainConfig, device: torch.device) -> list[Any]:
    """Apply `train.activation_checkpointing`, `train.compile` and `train.loss_chunk`; returns the blocks to shard.

    Only the blocks' `forward` changes, so the names of parameters stay, and the sharding's hooks surround it.

    Raises:
        RunError: the architecture has no blocks to do this to, or the machine no compiler.
    """
    found = blocks(model)
    if not found and (train.activation_checkpointing != "none" or train.compile):
        key = "train.compile" if train.compile else "train.activation_checkpointing"
        raise RunError(
            f"{model.config.model_type} names no blocks that {key} could act on", where=key, mend=f"leave {key} out"
        )
    for block in found if train.activation_checkpointing != "none" else ():
        block.forward = checkpointed(block.forward, train.activation_checkpointing)
    if train.compile:
        check_compiler(device)
        for block in found:
            block.forward = torch.compile(block.forward)
    if train.loss_chunk is not None:
        chunked.install(model, train.loss_chunk)
    return found


def check_compiler(device: torch.device) -> None:
    """Raise unless torch's compiler has what it needs: a C++ compiler on the CPU, Triton on CUDA."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RunError(
                "train.compile needs Triton, which is not there", where="train.compile", mend="pip install triton"
            )
        return
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        named = f" (CXX is {os.environ['CXX']})" if "CXX" in os.environ else ""
        raise RunError(
            f"train.compile needs a C++ compiler on the CPU, and none was found{named}",
            where="train.compile",
            mend="install g++ or clang++, name one in CXX, or set train.compile: false",
        ) from None
