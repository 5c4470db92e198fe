"""What a step holds and sends, counted on the ranks themselves, for the comparison with `orthogon plan`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer import config as configuration
from trainer.assembly import make, open_strategy, shape_of
from trainer.model.init import initialize
from trainer.model.loss import losses
from trainer.parallel import ddp, overlap


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sent:
    """Within it: bytes handed to collectives, as the least that this rank must send for them, by kind."""

    def __init__(self) -> None:
        self.bytes = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0, "optimizer exchange": 0.0}
        self.gather, self.swap, self.reduce = overlap._gather, dist.all_to_all_single, dist.all_reduce

    def all_gather(self, output: Tensor, given: Tensor, *rest: Any, **options: Any) -> Any:
        self.bytes["all-gather"] += output.nbytes - given.nbytes
        return self.gather(output, given, *rest, **options)

    def all_to_all(self, output: Tensor, given: Tensor, *sizes: Any, **options: Any) -> Any:
        if sizes:  # the optimizer's parcels, which hold nothing for their own rank
            self.bytes["optimizer exchange"] += given.nbytes
        else:  # gradients on their way to the ranks that sum them
            self.bytes["reduce-scatter"] += given.nbytes * (1 - 1 / options["group"].size())
        return self.swap(output, given, *sizes, **options)

    def all_reduce(self, tensor: Tensor, *rest: Any, **options: Any) -> Any:
        kind = "optimizer exchange" if tensor.dtype == torch.float64 else "all-reduce"  # only sums of matrices are so wide
        self.bytes[kind] += 2 * tensor.nbytes * (1 - 1 / dist.get_world_size(options.get("group")))
        return self.reduce(tensor, *rest, **options)

    def __enter__(self) -> Sent:
        self.patches = [
            mock.patch.object(overlap, "_gather", self.all_gather),
            mock.patch.object(dist, "all_to_all_single", self.all_to_all),
            mock.patch.object(dist, "all_reduce", self.all_reduce),
            mock.patch.object(ddp, "dist", SimpleNamespace(all_reduce=self.all_reduce)),  # which keeps what it was once asked for
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()


class Saved:
    """Within it: bytes of the storages that autograd keeps for the backward; weights, gathered ones too, are left out."""

    def __init__(self, model: Any) -> None:
        self.model, self.storages = model, dict[int, Tensor]()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        weights = {local(p).untyped_storage()._cdata for p in self.model.parameters()}
        if tensor.untyped_storage()._cdata not in weights:
            self.storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def measured(path: str, overrides: list[str], rows: int, micro_steps: int) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer state, saved activations of a micro-step, and sent in a step, on this rank."""
    config = configuration.load(Path(path), overrides)
    device, world = torch.device("cpu"), dist.get_world_size()
    strategy = open_strategy(config, device, world)
    shape = shape_of(config, {"vocab_size": config.data.tokenizer.vocab_size, "bos": 0, "eos": 1}, None)
    model = make(config, shape, strategy).model
    initialize(model, 0, device)
    optimizer = strategy.optimizer(model, config.optim)
    strategy.connect(model, optimizer)
    tokens = torch.randint(0, config.data.tokenizer.vocab_size, (rows, config.data.sequence_length))
    sent = Sent()
    with sent:
        for index in range(micro_steps):
            strategy.synchronize(last=index == micro_steps - 1)
            saved = Saved(model)
            with saved.hooks, strategy.context():
                _, objective = losses(strategy.forward, tokens, tokens)
            kept = saved.bytes
            del saved
            strategy.backward(objective)
        gradients = sum(share.nbytes for share, _ in strategy.gradients(list(model.parameters())))
        optimizer.step()
    strategy.close()
    return {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "gradients": gradients,
        "optimizer state": sum(local(t).nbytes for state in optimizer.state.values() for t in state.values()),
        "activations": kept,
        **sent.bytes,
    }
