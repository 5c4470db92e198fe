"""One process with whole parameters; and what every strategy does, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.outcome import RunError
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
optim: Any = lazy("trainer.optim")
model_build: Any = lazy("trainer.model.build")
distributed_tensor: Any = lazy("torch.distributed.tensor")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One process; no sharding."""

    __pydantic_config__ = STRICT
    name: Literal["single"] = "single"


def check(options: Options, optimizer: Any, train: Any) -> None:
    """Every optimizer and every option of `train` works on whole parameters."""


class Strategy:
    """How a model is spread over the ranks of one run. Every strategy's file has a class of this name, most of them over
    this one.

    A run calls, in this order: `shard` while the model has no storage, `optimizer` once it has its initial weights,
    `connect`, and then per micro-step `synchronize`, a forward of `forward` under `context`, and `backward`; per step
    `gradients`, `scale`, the optimizer's step, and `clear`.

    Args:
        options: the strategy's own `Options`.
        precision: "fp32" or "bf16", of the model's arithmetic.
        device: this rank's device.
        world: number of ranks.

    Raises:
        RunError: this strategy cannot run on so many ranks, or a package is missing.
    """

    def __init__(self, options: Any, precision: str, device: Any, world: int) -> None:
        self.options, self.precision, self.device, self.world = options, precision, device, world
        self.forward: Callable[..., Any] | None = None
        """What a forward calls in place of the model; set by `connect`."""
        self.parts: Any = None
        """What this rank holds of the parameters, for the figures of groups; None: what lies in them."""
        self.check_world()

    @property
    def initial_device(self) -> Any:
        """Where the initial weights are made."""
        return self.device

    def check_world(self) -> None:
        """Refuse a number of ranks that does not fit."""
        if self.world > 1:
            raise RunError(
                f"parallel.name is single and there are {self.world} ranks",
                where="parallel.name",
                mend="use fsdp2 or ddp, or resources.ranks: 1",
            )

    def mesh(self) -> str:
        """The ranks and what they hold, in a few words."""
        return "1 rank with whole parameters"

    def shard(self, model: Any, blocks: list[Any]) -> None:
        """Spread a model that has no storage yet, in place. What is done inside blocks (recomputing activations,
        compiling) is done before."""

    def optimizer(self, model: Any, options: Any) -> Any:
        """The optimizer over the model's parameters."""
        return optim.build_optimizer(model, options)

    def connect(self, model: Any, optimizer: Any) -> None:
        """Join model and optimizer into what is called in a step; once, after both exist."""
        self.forward = model

    def use_own_collectives(self, model: Any) -> None:
        """Undo what a rehearsal put in place of the strategy's own collectives."""

    def synchronize(self, *, last: bool) -> None:
        """Say before a micro-step's forward whether it is the last of its step."""

    def context(self) -> Any:
        """Around a forward: arithmetic in bf16 by autocast, weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Any) -> None:
        """Add the gradients of a loss; in the last micro-step they become sums over all ranks."""
        loss.backward()

    def gradients(self, parameters: list[Any]) -> list[tuple[Any, int]]:
        """This rank's share of the step's gradients: local tensors, and how many ranks hold a copy of each."""
        shares = []
        for gradient in (parameter.grad for parameter in parameters):
            if isinstance(gradient, distributed_tensor.DTensor):
                copies = 1
                for placement, size in zip(gradient.placements, gradient.device_mesh.shape, strict=True):
                    copies *= size if placement.is_replicate() else 1
                shares.append((gradient.to_local(), copies))
            elif gradient is not None:
                shares.append((gradient, self.world))
        return shares

    def missing(self, parameters: list[Any], names: dict[Any, str]) -> list[str]:
        """Names of the parameters without a gradient, which must be the same on all ranks."""
        return [names[parameter] for parameter in parameters if parameter.grad is None]

    def scale(self, parameters: list[Any], factor: float) -> None:
        """Multiply the step's gradients by a number that is the same on all ranks."""
        tensors = [tensor for tensor, _ in self.gradients(parameters)]
        if factor != 1.0 and tensors:
            torch._foreach_mul_(tensors, factor)

    def clear(self, parameters: list[Any]) -> None:
        """Drop the step's gradients, used or not."""
        for parameter in parameters:
            parameter.grad = None

    def settle(self, model: Any) -> None:
        """After forwards without a backward."""

    def tensors(self, model: Any, optimizer: Any, names: dict[Any, str]) -> dict[str, Any]:
        """All tensors of a checkpoint: weights (tied ones once), persistent buffers, optimizer state; those in use, or
        copies which `adopt` takes back."""
        state = {f"optim.{key}": value for key, value in optimizer.state_tensors(names).items()}
        return model_build.model_tensors(model) | state

    def adopt(self, tensors: dict[str, Any], model: Any, optimizer: Any, names: dict[Any, str]) -> None:
        """Take over what a checkpoint put into `tensors`."""

    def close(self) -> None:
        """Release what outlives the model."""
