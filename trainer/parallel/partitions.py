"""What ZeRO makes of parameters: one flat vector per group, cut into a partition per rank.

Here are AdamW on such partitions, this rank's share of the gradients, and the way of whole tensors out of the partitions
and back in, so that a checkpoint looks like that of any other strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer.optim import adamw
from trainer.optim.plan import shard_range
from trainer.outcome import RunError


class PartitionAdamW(torch.optim.Optimizer):
    """AdamW for an engine that puts flat partitions and their gradients in place of parameters, and calls `step` once per
    group."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        bare = [{**g, "params": [p for _, p in g["params"]], "initial_lr": g["lr"]} for g in groups]
        super().__init__(bare, {})
        self.factor = 1.0
        """What gradients are multiplied by in the next step."""
        self.applies = True
        """Whether the next step changes anything."""

    def start(self, partitions: list[Tensor]) -> None:
        """Make the state of all partitions."""
        for partition in partitions:
            self.state[partition] = adamw.init_state(partition, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the partitions that have gradients."""
        for group in self.param_groups:
            partitions = [p for p in group["params"] if p.grad is not None]
            if not partitions or not self.applies:
                continue
            gradients = [p.grad for p in partitions]
            torch._foreach_mul_(gradients, self.factor)
            state = {key: [self.state[p][key] for p in partitions] for key in self.state[partitions[0]]}
            adamw.update(partitions, gradients, state, group)


class Optimizer:
    """The optimizer as the training loop sees it: the engine's step, and state by parameter."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.members = [[parameter for _, parameter in group["params"]] for group in groups]
        """The parameters of each group, whose place in the groups the engine's partitions take."""
        self.inner = PartitionAdamW(groups)
        self.engine: Any = None
        self.pending = False
        """Whether there are gradients that no step has used."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    def step(self) -> None:
        """Update the partitions and hand the new weights to all ranks."""
        self.engine.step()
        self.pending = False

    def drop(self) -> None:
        """Drop gradients that no step used: a step of the engine in which nothing is applied."""
        if self.pending:
            self.inner.applies = False
            self.step()
            self.inner.applies = True

    def take_rejected(self) -> int:
        """AdamW rejects no matrix."""
        return 0

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without tensors, as JSON values."""
        return [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]

    def steps(self) -> Tensor:
        """The step count, the same for all partitions."""
        count: Tensor = next(iter(self.inner.state.values()))["step"]
        return count


def local_gradients(parameters: list[Any], stage: int) -> list[tuple[Tensor, int]]:
    """The gradients of this rank's partitions, after the reduction; each is on one rank only."""
    from deepspeed.utils import safe_get_local_grad

    if stage == 3:
        return [(safe_get_local_grad(p), 1) for p in parameters]
    held = [p for p in parameters if p._hp_mapping is not None]
    # The same call as in safe_get_full_grad, which would sum them over the ranks for each parameter.
    return [(p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group), 1) for p in held]


class Parts:
    """What this rank holds of the parameters, for the figures of parameter groups: parts of fp32 partitions and of their
    gradients, each on one rank only; empty where other ranks hold all of a parameter."""

    def __init__(self, optimizer: Optimizer, stage: int) -> None:
        self.members, self.stage = optimizer.members, stage

    def weight(self, parameter: Any) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        if self.stage == 3:
            held: Tensor = safe_get_local_fp32_param(parameter)
        else:
            mapping = parameter._hp_mapping
            held = parameter.new_empty(0) if mapping is None else mapping.get_hp_fragment()
        return held.detach()

    def gradient(self, parameter: Any) -> Tensor:
        found = local_gradients([parameter], self.stage)
        return found[0][0] if found else self.weight(parameter)

    def copies(self, parameter: Any) -> int:
        return 1


def whole_tensors(optimizer: Optimizer, names: dict[Any, str], rows: Rows) -> dict[str, Tensor]:
    """Copies of weights and state by their names in a checkpoint, each whole tensor cut into rows over the ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    for parameter, name in names.items():
        found[f"model.{name}"] = rows.of(safe_get_full_fp32_param(parameter))
    for parameter, name in names.items():
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"optim.{name}.{key}"] = rows.of(safe_get_full_optimizer_state(parameter, key))
        found[f"optim.{name}.step"] = optimizer.steps().clone()
    return found


def set_whole_tensors(optimizer: Optimizer, names: dict[Any, str], tensors: dict[str, Tensor], stage: int) -> None:
    """Put what `whole_tensors` gave, and a checkpoint filled, back into the partitions."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    counts = {float(tensors[f"optim.{name}.step"]) for name in names.values()}
    if len(counts) > 1:
        raise RunError(
            f"parameters of the checkpoint have done {sorted(counts)} steps, and ZeRO keeps one count for all",
            where="parallel.name",
            mend="resume with fsdp2",
        )
    for state in optimizer.inner.state.values():
        state["step"].fill_(counts.copy().pop())
    for parameter, name in names.items():
        value = _whole(tensors[f"model.{name}"]).to(optimizer.engine.device)
        if stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, _whole(tensors[f"optim.{name}.{key}"]), key)
    if stage < 3:
        optimizer.engine.optimizer.update_lp_params()


class Rows:
    """Cuts whole tensors into rows over all ranks, on the CPU. One for each strategy: a mesh may come with process
    groups of its own, which nothing frees."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def of(self, whole: Tensor) -> Tensor:
        start, stop = shard_range(whole.shape[0], self.mesh.size(), self.mesh.get_local_rank())
        local = whole[start:stop].detach().to("cpu", copy=True)
        return DTensor.from_local(local, self.mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def partitions(engine: Any, stage: int) -> Iterator[Tensor]:
    """This rank's fp32 partitions."""
    yield from (
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )
