"""DDP: whole parameters on every rank, gradients summed; matrix optimizers divide their work among the ranks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from trainer.parallel import single
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
dist: Any = lazy("torch.distributed")
optim: Any = lazy("trainer.optim")
parallel: Any = lazy("torch.nn.parallel")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Whole parameters on every rank; gradients are summed once per step, while the backward runs."""

    __pydantic_config__ = STRICT
    name: Literal["ddp"] = "ddp"


def check(options: Options, optimizer: Any) -> None:
    """Every optimizer works on whole parameters."""


class Strategy(single.Strategy):
    """Data parallelism over replicas."""

    def check_world(self) -> None:
        """Any number of ranks."""

    def mesh(self) -> str:
        return f"{self.world} ranks, each with whole parameters"

    def optimizer(self, model: Any, options: Any) -> Any:
        """Every matrix has one owner among the replicas, which does its products for all of them."""
        return optim.build_optimizer(model, options, replicas=dist.group.WORLD if self.world > 1 else None)

    def connect(self, model: Any, optimizer: Any) -> None:
        if self.world == 1:
            self.forward = model
            return
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are the same on all ranks. Before torch 2.13 the key has another name.
        known = inspect.signature(parallel.DistributedDataParallel).parameters
        key = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        self.forward = parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **{key: False}
        )

    def synchronize(self, *, last: bool) -> None:
        """Gradients are exchanged in the last micro-step only; to do it in each would save no memory."""
        if self.world > 1:
            self.forward.require_backward_grad_sync = last  # type: ignore[union-attr]

    def backward(self, loss: Any) -> None:
        """DDP takes means over the ranks, and the loss is divided by the global token count already."""
        (loss * self.world).backward()
