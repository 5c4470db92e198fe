"""The one optimizer: parameter groups that each carry a rule, over plain tensors and DTensors alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.optim.exchange import Layout, answer
from trainer.registry import alternatives


def rule_of(name: str) -> ModuleType:
    """The file of a rule, by name."""
    rules = alternatives("trainer.optim")
    if name not in rules:
        raise ValueError(f"there is no rule '{name}'; use one of {', '.join(rules)}")
    return rules[name]


def orthogonalizes(rule: ModuleType) -> bool:
    """Whether the rule works on whole matrices (and hence refuses vectors)."""
    return inspect.isgeneratorfunction(rule.update)


class ShardedOptimizer(torch.optim.Optimizer):
    """Every group names a rule; the state is created here, on every rank alike, in the parameters' layout.

    Args:
        params: groups with a key `rule`, and `params` as tensors or (name, tensor) pairs. Tensors are 2-D (m, n) with
            rows as outputs, or 3-D (E independent matrices) for orthogonalizing rules; plain, or DTensors on a 1-D
            mesh with Replicate or Shard.

    Raises:
        ValueError: unknown rule, vector under an orthogonalizing rule, or a layout that is not supported.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        groups = [dict(group) for group in params]
        for group in groups:
            options = asdict(rule_of(group["rule"]).Options())
            for key in ("name", "adamw"):
                options.pop(key, None)
            unknown = group.keys() - options.keys() - {"params", "rule", "label", "initial_lr"}
            if unknown:
                raise ValueError(
                    f"rule {group['rule']} has no {', '.join(sorted(unknown))}; it has {', '.join(options)}"
                )
            for key, value in options.items():
                group.setdefault(key, value)
            group.setdefault("label", group["rule"])
            group["initial_lr"] = group["lr"]
        super().__init__(groups, {})
        for index, group in enumerate(self.param_groups):
            rule = rule_of(group["rule"])
            for position, parameter in enumerate(group["params"]):
                names = group.get("param_names")
                name = names[position] if names else f"parameter {position} of group {index}, {tuple(parameter.shape)}"
                _check(name, parameter, orthogonalizes(rule), group["rule"])
                self.state[parameter] = rule.init_state(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every group. A missing gradient counts as zeros, on all ranks alike."""
        if closure is not None:
            raise ValueError("a closure is not supported: one forward and backward per step")
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters:
                continue
            weights = [_local(p) for p in parameters]
            gradients = [_local(p.grad) if p.grad is not None else torch.zeros_like(_local(p)) for p in parameters]
            keys = self.state[parameters[0]].keys()
            state = {key: [_local(self.state[p][key]) for p in parameters] for key in keys}
            rule = rule_of(group["rule"])
            work = rule.update(weights, gradients, state, group)
            if work is not None:
                self._serve(work, parameters, state)

    def _serve(self, work: Any, parameters: list[Tensor], state: dict[str, list[Tensor]]) -> None:
        """Run a rule's generator, answering what it asks."""
        try:
            request = next(work)
            while True:
                request = work.send(answer(request, _layout(request, parameters)))
        except StopIteration:
            pass

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """All state as `PARAMETER.KEY` -> tensor, for checkpoints."""
        return {f"{names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without tensors, as JSON values."""
        return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in self.param_groups]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing tensors. Unlike torch's method it never casts, and checks rules and shapes.

        Raises:
            ValueError: another rule, other keys, shapes or dtypes; names the place.
        """
        groups = state_dict["param_groups"]
        if [g["rule"] for g in groups] != [g["rule"] for g in self.param_groups]:
            raise ValueError(
                f"the state is of rules {[g['rule'] for g in groups]}, this optimizer has "
                f"{[g['rule'] for g in self.param_groups]}; build it with the same configuration"
            )
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            if len(mine["params"]) != len(theirs["params"]):
                raise ValueError(
                    f"group {mine['label']} has {len(mine['params'])} parameters, not {len(theirs['params'])}"
                )
            for parameter, index in zip(mine["params"], theirs["params"], strict=True):
                live, given = self.state[parameter], state_dict["state"][index]
                if live.keys() != given.keys():
                    raise ValueError(f"parameter {index} has state {sorted(live)}, not {sorted(given)}")
                for key, tensor in live.items():
                    value = given[key]
                    if value.shape != tensor.shape or value.dtype != tensor.dtype:
                        raise ValueError(
                            f"{key} of parameter {index} is {tuple(tensor.shape)} {tensor.dtype}, "
                            f"not {tuple(value.shape)} {value.dtype}"
                        )
            mine.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            for parameter, index in zip(mine["params"], theirs["params"], strict=True):
                for key, tensor in self.state[parameter].items():
                    tensor.copy_(state_dict["state"][index][key])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_dim(tensor: Tensor) -> int | None:
    if not isinstance(tensor, DTensor):
        return None
    placement = tensor.placements[0]
    return placement.dim if placement.is_shard() else None  # type: ignore[attr-defined]


def _layout(request: Any, parameters: list[Tensor]) -> Layout:
    """The layout of a request's inputs: full matrices like the parameter, statistics (..., m, 1) like its rows."""
    shapes, dims = [], []
    for tensors in request.inputs:
        of_input, of_dim = [], []
        for parameter, local in zip(parameters, tensors, strict=True):
            shape, dim = tuple(parameter.shape), _shard_dim(parameter)
            if local.shape[-1] == 1 and shape[-1] != 1 and dim != len(shape) - 1:
                shape = (*shape[:-1], 1)
            elif local.shape[-1] == 1 and local.shape[-2:] != _local(parameter).shape[-2:]:
                shape, dim = (*shape[:-1], 1), None
            of_input.append(shape)
            of_dim.append(dim)
        shapes.append(of_input)
        dims.append(of_dim)
    sharded = next((p for p in parameters if isinstance(p, DTensor)), None)
    return Layout(shapes, dims, sharded.device_mesh.get_group(0) if sharded is not None else None)


def _check(name: str, parameter: Tensor, matrices_only: bool, rule: str) -> None:
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device; give it storage before building the optimizer")
    if matrices_only and parameter.ndim not in (2, 3):
        raise ValueError(f"{name} has {parameter.ndim} dimensions; {rule} takes matrices: give it to adamw")
    if not isinstance(parameter, DTensor):
        return
    placement = parameter.placements[0]
    if parameter.device_mesh.ndim != 1 or not (placement.is_shard() or placement.is_replicate()):
        raise ValueError(f"{name} is laid out as {parameter.placements}; use Shard or Replicate on a 1-D mesh")
