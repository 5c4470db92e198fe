"""The one optimizer: parameter groups that each carry a rule, over plain tensors and DTensors alike."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.optim.exchange import Bucket, Crew, answer
from trainer.optim.options import GROUPING
from trainer.optim.plan import Stored, buckets, own
from trainer.optim.requests import Request, Sum, Turn, Whole
from trainer.optim.sums import add
from trainer.optim.turn import expand, turn
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
        params: groups with a key `rule`, and `params` as tensors or (name, tensor) pairs. Under a matrix rule they are
            2-D (m, n) with rows as outputs, or 3-D (E independent matrices), and a group may say `blocks` (rows of each
            block of fused weights) or `transposed` (stored as inputs x outputs). Tensors are plain, or DTensors on a 1-D
            mesh with Replicate or Shard, or on a (replica, shard) mesh.
        spread_replicas: divide the work among the replicas of a (replica, shard) mesh and exchange results, instead of
            repeating it in each. Under pure replication that work is always divided. It is that on whole matrices; AuON,
            DCT-AdamW and Trion have none.
        replicas: process group over which plain tensors are replicated (as under DDP); None: each rank does all.
        bucket_bytes: most bytes of shards that a rank sends at a time, counted as bf16 (fp32 products take twice as
            much). Working memory is a small multiple of it.

    Raises:
        ValueError: unknown rule or option, vector under a matrix rule, unsupported layout, or ranks that disagree.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, spread_replicas: bool = False,
        replicas: dist.ProcessGroup | None = None, bucket_bytes: int = 16 * 2**20,
    ) -> None:  # fmt: skip
        self._spread, self._replicas, self._limit = spread_replicas, replicas, bucket_bytes
        self._buckets: list[tuple[int, list[Tensor], Bucket]] = []
        groups = [_complete(dict(group)) for group in params]
        super().__init__(groups, {})
        for index, group in enumerate(self.param_groups):
            rule = rule_of(group["rule"])
            for position, parameter in enumerate(group["params"]):
                name = self._name(index, position)
                _check(name, parameter, group, orthogonalizes(rule))
                try:
                    state = rule.init_state(_logical(parameter, group), group)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                self.state[parameter] = {key: _logical(value, group).contiguous() for key, value in state.items()}
            _check_values(group)
        if not self.state:
            raise ValueError("the optimizer was given no parameters; is an iterator used up?")
        self._plan()
        device = next(iter(self.state)).device
        self._rejected = torch.zeros((), dtype=torch.int64, device=device)

    def _name(self, index: int, position: int) -> str:
        """A parameter as messages call it."""
        names, parameter = self.param_groups[index].get("param_names"), self.param_groups[index]["params"][position]
        return names[position] if names else f"parameter {position} of group {index}, {tuple(parameter.shape)}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: owners are chosen over all matrices, on all ranks alike."""
        if hasattr(self, "_rejected"):
            raise ValueError("groups cannot be added later; give all of them to the constructor")
        super().add_param_group(param_group)

    def _plan(self) -> None:
        """Owners and buckets of all matrices, per set of ranks; every rank must come to the same."""
        crews: dict[Crew, list[tuple[int, Tensor]]] = {}
        for index, group in enumerate(self.param_groups):
            matrix_rule = orthogonalizes(rule_of(group["rule"]))
            for parameter in group["params"]:
                crews.setdefault(self._crew(parameter), []).extend([(index, parameter)] if matrix_rule else [])
        facts = ([[_layout(p) for p in group["params"]] for group in self.param_groups], self._limit, self._spread)
        for crew, members in crews.items():
            stored = [_stored(parameter, self.param_groups[index]) for index, parameter in members]
            matrices = own(stored, crew.parts, crew.copies)
            agree(crew, (stored, matrices, facts, self.hyperparameters()))
            kinds: dict[tuple[int, bool], list[int]] = {}
            for position, (index, _) in enumerate(members):
                tall = (stored[position].blocks or stored[position].shape[1:])[0] >= stored[position].shape[2]
                kinds.setdefault((index, tall), []).append(position)
            for (index, _), positions in kinds.items():
                group = self.param_groups[index]
                whole = getattr(rule_of(group["rule"]), "whole_bytes", lambda shape, group: 0)
                extra = [whole(stored[p].shape, group) for p in positions]
                for chosen in buckets([stored[p] for p in positions], crew.parts, self._limit, 2, extra):
                    of_bucket = [positions[c] for c in chosen]
                    number = {p: n for n, p in enumerate(of_bucket)}
                    inside = [replace(m, parameter=number[m.parameter]) for m in matrices if m.parameter in number]
                    bucket = Bucket(crew, [stored[p] for p in of_bucket], inside)
                    self._buckets.append((index, [members[p][1] for p in of_bucket], bucket))

    def _crew(self, parameter: Tensor) -> Crew:
        if not isinstance(parameter, DTensor):
            return Crew(None, self._replicas, True)
        mesh = parameter.device_mesh
        if mesh.ndim == 2:
            return Crew(mesh.get_group(1), mesh.get_group(0), self._spread)
        if parameter.placements[0].is_replicate():
            return Crew(None, mesh.get_group(0), True)
        return Crew(mesh.get_group(0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every group. A missing gradient counts as zeros, on all ranks alike.

        Buckets follow each other as in a pipeline: while one is computed, the next is on its way to the owners and the
        one before it on its way back.
        """
        if closure is not None:
            raise ValueError("a closure is not supported: one forward and backward per step")
        waiting = [self._work(*entry) for entry in self._buckets]
        active: list[Any] = []
        first = True
        while waiting or active:
            if waiting:
                active.insert(0, waiting.pop(0))
            active = [task for task in active if next(task, self) is not self]  # newest first: it only sends
            if first:
                self._local_rules()  # while the first exchange flies
            first = False
        if first:
            self._local_rules()

    def _local_rules(self) -> None:
        for group in self.param_groups:
            rule = rule_of(group["rule"])
            if group["params"] and not orthogonalizes(rule):
                rule.update(*self._tensors(group["params"], group), group)

    def _work(self, index: int, parameters: list[Tensor], bucket: Bucket) -> Iterator[None]:
        """Run a rule's generator on one bucket, answering what it asks."""
        group = self.param_groups[index]
        shapes = [_logical(p, group).shape for p in parameters]
        work = rule_of(group["rule"]).update(*self._tensors(parameters, group), {**group, "shapes": shapes})
        request = next(work)
        while request is not None:
            result = yield from self._answer(request, bucket)
            try:
                request = work.send(result)
            except StopIteration:
                request = None

    def _answer(self, request: Request, bucket: Bucket) -> Generator[None, None, Any]:
        if isinstance(request, Whole):
            return (yield from answer(request, bucket, self._rejected))
        if isinstance(request, Sum):
            return (yield from add(request, bucket, self._rejected))
        if isinstance(request, Turn):
            return (yield from turn(request, bucket))
        return (yield from expand(request, bucket, self._rejected))

    def _tensors(
        self, parameters: list[Tensor], group: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
        """Local weights, gradients and state, as the rule sees them: rows are outputs."""
        weights = [_logical(_local(p), group) for p in parameters]
        gradients = [
            torch.zeros_like(w) if p.grad is None else _logical(_local(p.grad), group)
            for p, w in zip(parameters, weights, strict=True)
        ]
        keys = self.state[parameters[0]].keys()
        state = {key: [_logical(_local(self.state[p][key]), group) for p in parameters] for key in keys}
        return weights, gradients, state

    def take_rejected(self) -> int:
        """Matrices rejected since the last call, whose update was not finite or out of norm; of those that this rank
        owns. Waits for the device."""
        crews = {bucket.crew for _, _, bucket in self._buckets}
        repeated = all(c.replicas is not None and not c.spread and dist.get_rank(c.replicas) > 0 for c in crews)
        count = 0 if repeated else int(self._rejected)
        self._rejected.zero_()
        return count

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """All state as `PARAMETER.KEY` -> tensor, for checkpoints."""
        return {f"{names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without tensors, as JSON values."""
        return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in self.param_groups]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing tensors, all of it or nothing. Unlike torch's method it never casts.

        Raises:
            ValueError: another rule, other options, keys, shapes, dtypes or layouts; names the parameter.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        rules, given = [group["rule"] for group in self.param_groups], [group.get("rule", "?") for group in groups]
        if rules != given:
            raise ValueError(
                f"the state is of rules {given}, this optimizer has {rules}; build it with the same configuration"
            )
        copies: list[tuple[Tensor, Tensor]] = []
        for number, (mine, theirs) in enumerate(zip(self.param_groups, groups, strict=True)):
            label, indices = mine["label"], theirs["params"]
            if len(mine["params"]) != len(indices):
                raise ValueError(f"group {label} has {len(mine['params'])} parameters, not {len(indices)}")
            unknown = theirs.keys() - mine.keys() - {"param_names"}
            if unknown:
                raise ValueError(f"group {label} has no option {', '.join(sorted(unknown))}, as the state does")
            _check_values(_complete({k: v for k, v in theirs.items() if k not in ("params", "param_names")}))
            for key in ("blocks", "transposed"):  # what the plan was made for
                if mine.get(key) != theirs.get(key, mine.get(key)):
                    raise ValueError(f"{key} of group {label} is {mine[key]}, not {theirs[key]} as in the state")
            theirs_names = theirs.get("param_names", [])
            for position, (parameter, index) in enumerate(zip(mine["params"], indices, strict=True)):
                name = self._name(number, position)
                if "param_names" in mine and theirs_names and theirs_names[position] != name:
                    raise ValueError(f"the state at the place of {name} is of {theirs_names[position]}")
                copies += _fitting(name, self.state[parameter], state.get(index, {}))
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})
        for tensor, value in copies:
            tensor.copy_(value)


def _fitting(name: str, live: dict[str, Tensor], given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of live and given tensors; raises where they do not fit."""
    if live.keys() != given.keys():
        raise ValueError(f"{name} has state {sorted(live)}, not {sorted(given)}")
    for key, tensor in live.items():
        mine, theirs = _describe(tensor), _describe(given[key])
        if mine != theirs:
            raise ValueError(f"{key} of {name} is {mine}, not {theirs}")
    return [(tensor, given[key]) for key, tensor in live.items()]


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "sharded" if isinstance(value, DTensor) else "plain"
    return f"{kind} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.placements if isinstance(tensor, DTensor) else None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _logical(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """A tensor as a rule sees it, with rows as outputs, or such a tensor as it is stored."""
    return tensor.mT if group.get("transposed") and tensor.ndim > 1 else tensor


def _complete(group: dict[str, Any]) -> dict[str, Any]:
    """A group with all of its rule's options."""
    rule = rule_of(group["rule"])
    options = {key: value for key, value in asdict(rule.Options()).items() if key not in GROUPING}
    if orthogonalizes(rule):
        options |= {"blocks": [], "transposed": False}
    unknown = group.keys() - options.keys() - {"params", "rule", "label", "initial_lr"}
    if unknown:
        raise ValueError(f"rule {group['rule']} has no {', '.join(sorted(unknown))}; it has {', '.join(options)}")
    for key, kind in get_type_hints(rule.Options).items():
        words = [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
        if words and key in group and group[key] not in words:
            raise ValueError(f"{key} '{group[key]}' is unknown to {group['rule']}; use one of {', '.join(words)}")
    group = {"label": group["rule"], **options, **group}
    return {"initial_lr": group["lr"], **group}


def _check_values(group: dict[str, Any]) -> None:
    """Refuse numbers out of the bounds that a rule's `Options` state, as a configuration would."""
    rule, options = group["rule"], rule_of(group["rule"]).Options
    given = {key: group[key] for key in options.__dataclass_fields__.keys() & group.keys()}
    try:
        TypeAdapter(options).validate_json(json.dumps(given, default=repr))
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{first['loc'][0]} of {rule} is {first['input']!r}: {said[0].lower()}{said[1:]}") from None


def _stored(parameter: Tensor, group: dict[str, Any]) -> Stored:
    logical = _logical(parameter, group)
    experts, rows, columns = logical.shape if logical.ndim == 3 else (1, *logical.shape)
    dim = None
    if isinstance(logical, DTensor) and logical.placements[-1].is_shard():
        dim = logical.placements[-1].dim + (3 - logical.ndim)  # type: ignore[attr-defined]
    return Stored((experts, rows, columns), dim, tuple(group["blocks"]))


def agree(crew: Crew, facts: object) -> None:
    """Raise on every rank unless all ranks of the crew have the same facts."""
    value = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1
    for group in (crew.shards, crew.replicas):
        if group is None:
            continue
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        extremes = torch.tensor([value, -value], dtype=torch.int64, device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        if int(extremes[0]) != -int(extremes[1]):
            raise ValueError(
                "the ranks were given different parameters or options; build the optimizer alike on all of them"
            )


def _check(name: str, parameter: Tensor, group: dict[str, Any], matrix_rule: bool) -> None:
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device; give it storage before building the optimizer")
    if matrix_rule and parameter.ndim not in (2, 3):
        raise ValueError(f"{name} has {parameter.ndim} dimensions; {group['rule']} takes matrices: give it to adamw")
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
        raise ValueError(f"{name} is of {parameter.dtype}; use float64, float32, bfloat16 or float16")
    if matrix_rule and not parameter.numel():
        raise ValueError(f"{name} of shape {tuple(parameter.shape)} has no entries; leave it out")
    rows = parameter.shape[-1 if group.get("transposed") else -2] if matrix_rule else 0
    blocks = group["blocks"] if matrix_rule else []
    if blocks and (sum(blocks) != rows or min(blocks) < 1):
        raise ValueError(f"{name} has {rows} rows, which blocks {blocks} do not cut into pieces of 1 row or more")
    if not isinstance(parameter, DTensor):
        return
    *outer, last = parameter.placements
    known = all(p.is_replicate() for p in outer) and (last.is_replicate() or last.is_shard())
    if parameter.device_mesh.ndim > 2 or not known or (outer and matrix_rule and last.is_replicate()):
        raise ValueError(
            f"{name} is laid out as {parameter.placements}; use Shard or Replicate on a 1-D mesh, or (Replicate, Shard)"
        )
