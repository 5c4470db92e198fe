"""FSDP2: parameters, gradients and optimizer state sharded by rows over the ranks, one group per block; with
`replicate` over groups of ranks that each hold all shards (HSDP)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.outcome import RunError
from trainer.parallel import single
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
fsdp: Any = lazy("torch.distributed.fsdp")
device_mesh: Any = lazy("torch.distributed.device_mesh")
optim: Any = lazy("trainer.optim")
overlap: Any = lazy("trainer.parallel.overlap")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sharded by FSDP2 over all ranks, or over groups of them (HSDP)."""

    __pydantic_config__ = STRICT
    name: Literal["fsdp2"] = "fsdp2"
    replicate: Annotated[int, Field(gt=0)] = 1
    """Groups of ranks that each hold all shards (HSDP); a group is ranks / replicate neighbours, e.g. those of a node."""
    spread_replicas: bool = False
    """Divide the matrix optimizer's work among the replicas too and exchange its results, instead of repeating it."""
    reshard_after_forward: bool = True
    """Free a block's whole weights after its forward: less memory, one more gather."""
    sync_every_micro_step: bool = True
    """Reduce gradients to shards after each micro-step: less memory, more traffic than once per step."""


def check(options: Options, optimizer: Any, train: Any) -> None:
    """Refuse an option that would do nothing."""
    if options.spread_replicas and options.replicate == 1:
        raise RunError(
            "parallel.spread_replicas divides work among replicas, and parallel.replicate is 1",
            where="parallel.spread_replicas",
            mend="set parallel.replicate, or leave spread_replicas out",
        )
    if options.spread_replicas and not hasattr(optimizer, "polar_dtype"):  # an option of rules on whole matrices
        raise RunError(
            f"parallel.spread_replicas divides work on whole matrices among replicas, and {optimizer.name} has none",
            where="parallel.spread_replicas",
            mend="leave spread_replicas out",
        )


class Strategy(single.Strategy):
    """FSDP2 on a mesh of (ranks,) or (replicas, ranks of a replica)."""

    reductions: Any = None
    """On a CPU: the gradients under way."""
    first = True
    """Whether the next reduction is the first of its step: it has nothing to be added to."""

    def check_world(self) -> None:
        if self.world % self.options.replicate:
            raise RunError(
                f"parallel.replicate = {self.options.replicate} does not divide {self.world} ranks",
                where="parallel.replicate",
                mend=f"use one of {', '.join(str(n) for n in range(1, self.world + 1) if self.world % n == 0)}",
            )

    def mesh(self) -> str:
        replicas, parts = self.options.replicate, self.world // self.options.replicate
        if replicas == 1:
            return f"shard {parts}: each rank holds 1/{parts} of every parameter"
        return f"replicate {replicas} x shard {parts}: each rank holds 1/{parts} of every parameter"

    def shard(self, model: Any, blocks: list[Any]) -> None:
        """Wrap each block and the rest. Gradients are sums over ranks: the loss is divided by the global token count."""
        replicas = self.options.replicate
        shape, names = (self.world,), ("shard",)
        if replicas > 1:
            shape, names = (replicas, self.world // replicas), ("replicate", "shard")
        mesh = device_mesh.init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        compute = torch.bfloat16 if self.precision == "bf16" else torch.float32
        policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for module in blocks:
            # The backward begins with the last block and the rest: freed, they would be gathered again at once.
            free = self.options.reshard_after_forward and module is not blocks[-1]
            fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=free)
        fsdp.fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        wrapped = _wrapped(model)
        for module in wrapped:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor of 1 needs it on gloo
        if self.device.type == "cpu" and self.world > 1:
            self.reductions = overlap.install(wrapped, [model, *blocks])

    def use_own_collectives(self, model: Any) -> None:
        if self.reductions is not None:
            overlap.use(_wrapped(model), self.reductions)

    def optimizer(self, model: Any, options: Any) -> Any:
        return optim.build_optimizer(model, options, spread_replicas=self.options.spread_replicas)

    def synchronize(self, *, last: bool) -> None:
        """Replicas exchange once per step in either case."""
        self.forward.set_requires_gradient_sync(last or self.options.sync_every_micro_step)  # type: ignore[union-attr]
        self.forward.set_requires_all_reduce(last)  # type: ignore[union-attr]
        if self.reductions is not None:
            self.reductions.deferred = self.first and self.options.replicate == 1
        self.first = last or not self.options.sync_every_micro_step

    def backward(self, loss: Any) -> None:
        loss.backward()
        if self.reductions is not None:
            self.reductions.finish()

    def clear(self, parameters: list[Any]) -> None:
        super().clear(parameters)
        self.first = True

    def context(self) -> Any:
        """FSDP2 casts the gathered weights by itself."""
        return nullcontext()

    def settle(self, model: Any) -> None:
        """Free gathered weights after forwards without a backward.

        With `reshard_after_forward: false` only the backward frees them; until then the model's parameters are the
        gathered ones, and the next forward would not gather anew.
        """
        for module in _wrapped(model):
            module.reshard()


def mesh_of(device: Any, world: int) -> Any:
    """All ranks in one row."""
    return device_mesh.init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def shard_frozen(model: Any, blocks: list[Any], mesh: Any, precision: str) -> None:
    """Shard a model that is only asked: every group's whole weights, those of the root too, are freed after its forward."""
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute)
    for module in [*blocks, model]:
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _wrapped(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
