"""Which parameter gets which rule: every one exactly once, by the module that owns it."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from trainer.optim.options import GROUPING
from trainer.optim.sharded import ShardedOptimizer, orthogonalizes, rule_of
from trainer.outcome import RunError


def build_optimizer(model: nn.Module, options: Any, **engine: Any) -> ShardedOptimizer:
    """One optimizer over all parameters of `model`; `engine` goes to `ShardedOptimizer`. See `parameter_groups`.

    Raises:
        RunError: what `parameter_groups` or the optimizer refuses.
    """
    try:
        return ShardedOptimizer(parameter_groups(model, options), **engine)
    except ValueError as error:
        raise refused(error) from None


def refused(error: ValueError) -> RunError:
    """What an optimizer says, as an error of the configuration; after a semicolon it says what to do."""
    what, _, mend = str(error).partition("; ")
    return RunError(what, where="optim", mend=mend or "see docs/optimizers.md")


def parameter_groups(model: nn.Module, options: Any) -> list[dict[str, Any]]:
    """Groups over all parameters of `model`, as `ShardedOptimizer` takes them.

    Hidden matrices get the rule of `options`; embeddings, head, routers, norms, biases and scalars get AdamW. Weight
    decay acts on hidden matrices, and on the head where `decay_head` says so. Weights that are stored as (inputs, outputs) are seen
    transposed. Parameters with the same multipliers, blocks and orientation share a group.

    Raises:
        RunError: a pattern of `split` or `multipliers` that fits no parameter, blocks that do not fit one, or a head that
            cannot decay.
        ValueError: a timescale that was not turned into a weight decay (`trainer.optim.decay.settled`).
    """
    matrices, embeddings, vectors = classify(model)
    rule = rule_of(options.name)
    others = options.adamw if orthogonalizes(rule) else options
    if options.tau_epochs is not None or others.tau_epochs is not None:
        raise ValueError("tau_epochs is no weight decay yet; use trainer.optim.decay.settled(options, steps_per_epoch)")
    own = {key: value for key, value in asdict(options).items() if key not in GROUPING}
    rest = {key: value for key, value in asdict(others).items() if key not in GROUPING}
    apart = head(model) if others.decay_head else set()
    transposed = stored_transposed(model)
    split, multipliers = Patterns(options, "split"), Patterns(options, "multipliers")
    groups: dict[Any, dict[str, Any]] = {}
    for label, named in (("matrices", matrices), ("embeddings", embeddings), ("vectors", vectors)):
        for name, parameter in named:
            multiplier = multipliers.last(label, name)
            group = dict(own if label == "matrices" else rest)
            kind = "head" if parameter in apart else label
            if kind in ("embeddings", "vectors"):
                group |= {"weight_decay": 0.0}
            elif kind == "matrices" and orthogonalizes(rule):
                rows = parameter.shape[-1 if name in transposed else -2]
                group |= {"transposed": name in transposed, "blocks": block_rows(name, rows, split.last(name))}
            if multiplier is not None:
                group["lr"] *= multiplier.lr
                group["weight_decay"] *= multiplier.weight_decay
            key = (kind, multiplier, group.get("transposed"), tuple(group.get("blocks", ())))
            entry = {"label": kind, "rule": options.name if label == "matrices" else "adamw", "params": [], **group}
            groups.setdefault(key, entry)["params"].append((name, parameter))
    split.check()
    multipliers.check()
    return list(groups.values())


class Patterns:
    """A table of name patterns of the options; knows which of them fitted."""

    def __init__(self, options: Any, key: str) -> None:
        self.key, self.table = key, getattr(options, key, {})
        self.unused = set(self.table)

    def last(self, *names: str) -> Any:
        """The value of the last pattern that fits one of the names, None without one."""
        found = None
        for pattern, value in self.table.items():
            if any(fnmatchcase(name, pattern) for name in names):
                self.unused.discard(pattern)
                found = value
        return found

    def check(self) -> None:
        for pattern in sorted(self.unused):
            raise RunError(
                f"'{pattern}' fits no {'hidden matrix' if self.key == 'split' else 'parameter'}",
                where=f"optim.{self.key}",
                mend="give a pattern such as '*.qkv_proj.weight'; names are those of the model's parameters",
            )


def block_rows(name: str, rows: int, split: int | list[int] | None) -> list[int]:
    """The rows of each block of a matrix; empty for one block."""
    blocks = [rows // split] * split if isinstance(split, int) and split > 0 else split or []
    if split is not None and (not isinstance(blocks, list) or sum(blocks) != rows or min(blocks) < 1):
        raise RunError(
            f"{name} has {rows} rows, which {split} does not divide into blocks",
            where="optim.split",
            mend="give a number that divides the rows, or the rows of each block",
        )
    return blocks if len(blocks) > 1 else []


def stored_transposed(model: nn.Module) -> set[str]:
    """Names of the weights that lie as (inputs, outputs): GPT-2's Conv1D, and the experts of some mixtures."""
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    experts = (
        f"{name}.{key}"
        for name, module in model.named_modules()
        if getattr(module, "is_transposed", False) is True
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
    return conv1d | set(experts)


def head(model: nn.Module) -> set[Tensor]:
    """The matrix of the head, which is all of it that decays.

    Raises:
        RunError: there is none, or it is that of the embeddings.
    """
    ends = [
        getattr(model, get)() if hasattr(model, get) else None
        for get in ("get_output_embeddings", "get_input_embeddings")
    ]
    last, first = [{p for p in end.parameters() if p.ndim > 1} if end is not None else set() for end in ends]
    if not last or last & first:
        raise RunError(
            "decay_head: the head shares its weights with the embeddings"
            if last
            else "decay_head: the model has no head",
            where="optim.decay_head, optim.adamw.decay_head",
            mend="set model.config.tie_word_embeddings: false, or leave decay_head out" if last else "leave it out",
        )
    return last


def classify(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(hidden matrices, embeddings and head and routers, the rest), as (name, parameter); tied weights count once.

    The rest are vectors, the biases of all experts in one tensor, and the kernels of convolutions.
    """
    ends = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get)() if hasattr(model, get) else None
        if module is not None:
            ends.add(module)
    matrices, embeddings, vectors = [], [], []
    seen: set[Tensor] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            full = f"{module_name}.{name}" if module_name else name
            router = module_name.rpartition(".")[2] in ("gate", "router") or "Router" in type(module).__name__
            if module in ends or isinstance(module, nn.Embedding) or (router and parameter.ndim > 1):
                embeddings.append((full, parameter))
            elif parameter.ndim < 2 or name.endswith("bias") or isinstance(module, _Convolution):
                vectors.append((full, parameter))
            else:
                matrices.append((full, parameter))
    return matrices, embeddings, vectors
