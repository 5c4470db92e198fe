"""What the ranks of the distributed tests do. Imported by spawned processes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer import config as configuration
from trainer.config import ModelConfig
from trainer.guard.verdict import agree
from trainer.model.build import architecture, blocks, build
from trainer.model.init import initialize
from trainer.model.loss import summed_loss, token_count
from trainer.optim.groups import build_optimizer
from trainer.parallel import fsdp2
from trainer.registry import alternatives

LLAMA = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 3,
}  # fmt: skip
VOCABULARY, LENGTH = 61, 16


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of the bytes of each whole tensor."""
    return {
        name: hashlib.sha256(whole(t.detach()).contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


# Fused weights, as outputs x inputs; and weights stored as inputs x outputs.
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3}


def model_of(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return spread_model_of(fsdp2.Options(), seed, dtype=dtype, **changes)[0]


def spread_model_of(
    options: Any, seed: int = 0, *, dtype: torch.dtype = torch.float32, config: Any = None, **changes: Any
) -> tuple[Any, Any]:
    """A model under the strategy that the options belong to, and the strategy."""
    shape = architecture(
        ModelConfig(config=(config or LLAMA) | changes), vocab_size=VOCABULARY, bos=0, eos=1, max_length=LENGTH
    )
    model = build(shape).to(dtype)
    module = alternatives("trainer.parallel")[options.name]
    strategy = module.Strategy(options, "fp32", torch.device("cpu"), dist.get_world_size())
    strategy.shard(model, blocks(model))
    if dtype is torch.float64:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module._get_fsdp_state()._fsdp_param_group.mp_policy = MixedPrecisionPolicy()
                module._get_fsdp_state()._mp_policy = MixedPrecisionPolicy()
    initialize(model, seed, torch.device("cpu"))
    strategy.connect(model, None)
    return model, strategy


def initial_state(seed: int, tied: bool) -> dict[str, str]:
    model = model_of(seed, tie_word_embeddings=tied)
    tensors = dict(model.named_parameters())
    assert all(torch.isfinite(whole(t)).all() for t in tensors.values())
    return fingerprint(tensors)


def optimizer_steps(
    name: str, steps: int, options: dict[str, Any], config: Any = None
) -> dict[str, torch.Tensor]:
    """Whole weights and state after steps on gradients that depend on names and steps only."""
    raw = {
        "name": "t", "model": {"config": LLAMA}, "data": {"path": "stdlib"}, "optim": {"name": name, **options},
        "train": {"length": "1 steps", "tokens_per_step": 1024}, "parallel": {"name": "fsdp2"},
    }  # fmt: skip
    model = model_of(config=config)
    optimizer = build_optimizer(model, configuration.parse(raw).optim)
    for step in range(steps):
        for key, parameter in model.named_parameters():
            gradient = gradient_of(key, step, parameter.shape)
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        optimizer.step()
    names = {parameter: key for key, parameter in model.named_parameters()}
    tensors = dict(model.named_parameters()) | optimizer.state_tensors(names)
    return {key: whole(value.detach()) for key, value in tensors.items()}


def gradient_of(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(f"{name}{step}")))


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def loss_and_gradients(accumulation: int, sequences: int, options: Any = None) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Global loss, norm and float64 gradients of one batch, split over ranks and `accumulation` micro-steps."""
    model, strategy = spread_model_of(options or fsdp2.Options(sync_every_micro_step=False), dtype=torch.float64)
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens = torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    rows = -(-sequences // (world * accumulation))
    loss_sum, count, expected = 0.0, 0, sequences * LENGTH
    for j in range(accumulation):
        places = torch.arange(rows) + (j * world + rank) * rows
        batch = tokens[places.clamp(max=sequences - 1)]
        targets = batch[:, 1:].clone()
        targets[places >= sequences] = -100
        strategy.synchronize(last=j == accumulation - 1)
        logits = strategy.forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        strategy.backward(loss / expected)
        loss_sum, count = loss_sum + float(loss), count + token_count(targets)
    parameters = list(model.parameters())
    verdict = agree(
        strategy.gradients(parameters), loss_sum, count, expected, signal=False, timeout=False, save_due=False, saved=False,
        rejected=0, device=torch.device("cpu"),
    )  # fmt: skip
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return verdict.loss, verdict.gradient_norm, gradients


def verdicts() -> list[tuple[bool, str, bool]]:
    """What ranks agree on when only the last of them sees something."""
    last = dist.get_rank() == dist.get_world_size() - 1
    device = torch.device("cpu")
    seen = []
    for loss, signal, timeout, save in (
        (1.0, False, False, False), (float("nan"), False, False, False), (float("inf"), False, False, False),
        (1.0, True, False, False), (1.0, False, True, False), (1.0, False, False, True),
    ):  # fmt: skip
        verdict = agree(
            [], loss if last else 1.0, 8, 8, signal=signal and last, timeout=timeout and last, save_due=save and last,
            saved=False, rejected=0, device=device,
        )  # fmt: skip
        seen.append((verdict.finite, verdict.stop, verdict.save_due))
    return seen


def complete() -> list[bool]:
    """Whether a save behind the run's back counts as complete when one rank has written its part, and when all have."""
    device, last = torch.device("cpu"), dist.get_rank() == dist.get_world_size() - 1
    return [
        agree([], 1.0, 8, 8, signal=False, timeout=False, save_due=False, saved=mine, rejected=0, device=device).saved
        for mine in (last, not last, True)
    ]


def sharded(tensor: torch.Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def checkpoint_tensors(fill: bool) -> dict[str, torch.Tensor]:
    """Even, uneven and empty shards, several dtypes, 0-d and replicated tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "model.even": sharded(torch.randn(6, 4, generator=generator)),
        "model.uneven": sharded(torch.randn(7, 5, generator=generator)),
        "model.one_row": sharded(torch.randn(1, 3, generator=generator)),
        "model.bf16": sharded(torch.randn(5, 2, generator=generator).bfloat16()),
        "optim.index": sharded(torch.arange(7)),
        "optim.step": torch.tensor(300.0),
        "optim.whole": torch.randn(3, 3, generator=generator),
    }
    return tensors if fill else {name: torch.zeros_like(t) for name, t in tensors.items()}


def save_generation(folder: str, step: int) -> str:
    from trainer.checkpoint.save import save

    path = save(
        Path(folder), step, 8 * step, checkpoint_tensors(True), config={"a": 1}, state={"s": step}, lineage={}, attempt=1
    )
    return path.name


def load_newest(folder: str) -> tuple[str, int, int, dict[str, str]] | None:
    from trainer.checkpoint.load import load, newest_verified

    found = newest_verified(Path(folder))
    if found is None:
        return None
    tensors = checkpoint_tensors(False)
    count = load(found[0], found[1], tensors)
    assert fingerprint(tensors) == fingerprint(checkpoint_tensors(True))
    return found[0].name, found[1].position, count, {k: str(t.dtype) for k, t in tensors.items()}


def load_into_other(folder: str, change: str) -> str:
    from trainer.checkpoint.load import load, newest_verified
    from trainer.outcome import RunError

    found = newest_verified(Path(folder))
    assert found is not None
    tensors = checkpoint_tensors(False)
    if change == "dtype":
        tensors["model.even"] = tensors["model.even"].double()
    elif change == "shape":
        tensors["model.even"] = sharded(torch.zeros(6, 5))
    elif change == "missing":
        del tensors["optim.step"]
    else:
        tensors["optim.extra"] = torch.zeros(1)
    try:
        load(found[0], found[1], tensors)
    except RunError as error:
        return error.what
    return "loaded"


def save_on_full_disk(folder: str) -> tuple[str, str]:
    """Only the last rank's disk is full."""
    from trainer.checkpoint import save as saving
    from trainer.outcome import RunError

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    broken = mock.patch.object(saving, "fsync_file", full) if dist.get_rank() == dist.get_world_size() - 1 else mock.MagicMock()
    with broken:
        try:
            save_generation(folder, 2)
        except RunError as error:
            return error.outcome.value, error.what
    return "saved", ""


def decide_together() -> tuple[str, str]:
    """Errors of one rank reach all."""
    from trainer import distributed
    from trainer.outcome import RunError

    def only_last() -> int:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RunError("last", mend="x")
        return 1

    def only_first() -> int:
        raise RunError("first", mend="x")

    texts = []
    for call in (lambda: distributed.together(only_last), lambda: distributed.on_rank_zero(only_first)):
        try:
            call()
            texts.append("no error")
        except RunError as error:
            texts.append(error.what)
    return texts[0], texts[1]


def validation_sum(total: int) -> float:
    """The loss function on masked rows only adds nothing."""
    model = model_of()
    inputs = torch.zeros(2, LENGTH, dtype=torch.long)
    return float(summed_loss(model, inputs, torch.full((2, LENGTH), -100))) + 0.0 * total
