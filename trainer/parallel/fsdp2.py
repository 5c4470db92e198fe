"""FSDP2: parameters, gradients and optimizer state sharded by rows over the ranks, one group per block."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
fsdp: Any = lazy("torch.distributed.fsdp")
device_mesh: Any = lazy("torch.distributed.device_mesh")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sharded by FSDP2 over all ranks."""

    __pydantic_config__ = STRICT
    name: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    """Free a block's whole weights after its forward: less memory, one more gather."""
    sync_every_micro_step: bool = True
    """Reduce gradients after each micro-step: less memory, more traffic than once per step."""


def shard(model: Any, blocks: list[Any], options: Options, precision: str, device: Any, world: int) -> Any:
    """Wrap each block and the rest. Gradients are summed over ranks: the loss is divided by the global token count."""
    mesh = device_mesh.init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=options.reshard_after_forward)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor of 1 needs it on gloo
    return model


def synchronize_gradients(model: Any, options: Options, *, last: bool) -> None:
    """Say before a micro-step's backward whether it reduces gradients."""
    model.set_requires_gradient_sync(last or options.sync_every_micro_step)


def forward_context(precision: str, device: Any) -> Any:
    """FSDP2 casts the gathered weights by itself."""
    return nullcontext()


def settle(model: Any) -> None:
    """Free gathered weights after forwards without a backward.

    With `reshard_after_forward: false` only the backward frees them; until then the model's parameters are the gathered
    ones, and the next forward would not gather anew.
    """
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
