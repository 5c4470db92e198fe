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


def check(options: Options, optimizer: Any, train: Any) -> None:
    """Every optimizer and every option of `train` works on whole parameters."""


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
        known = inspect.signature(parallel.DistributedDataParallel).parameters
        buffers = (
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        )  # before torch 2.13
        wrapped = parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **{buffers: False}
        )
        # The loss is divided by the global token count already: sums, where DDP alone would take means.
        wrapped.register_comm_hook(None, _sum)
        self.forward = wrapped

    def synchronize(self, *, last: bool) -> None:
        """Earlier micro-steps add to this rank's gradients only: summing them twice would count them twice."""
        if self.world > 1:
            self.forward.require_backward_grad_sync = last  # type: ignore[union-attr]


def _sum(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses any annotation but its own class
    """Communication hook: the sum of a bucket of gradients over the ranks."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
