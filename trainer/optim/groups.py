"""Which parameter gets which rule: every one exactly once, by the module that owns it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from trainer.optim.sharded import ShardedOptimizer, orthogonalizes, rule_of
from trainer.outcome import RunError


def build_optimizer(model: nn.Module, options: Any) -> ShardedOptimizer:
    """One optimizer over all parameters of `model`.

    Hidden matrices get the rule of `options`; embeddings, head, routers, norms, biases and scalars get AdamW. Weight
    decay acts on matrices outside the embeddings only.
    """
    matrices, embeddings, vectors = classify(model)
    rule = rule_of(options.name)
    own = {key: value for key, value in asdict(options).items() if key not in ("name", "adamw")}
    rest = {k: v for k, v in asdict(options.adamw).items() if k != "name"} if orthogonalizes(rule) else own
    groups = [
        {"label": "matrices", "rule": options.name, "params": matrices, **own},
        {"label": "embeddings", "rule": "adamw", "params": embeddings, **rest, "weight_decay": 0.0},
        {"label": "vectors", "rule": "adamw", "params": vectors, **rest, "weight_decay": 0.0},
    ]
    return ShardedOptimizer([group for group in groups if group["params"]])


def classify(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(hidden matrices, embeddings and head and routers, the rest), as (name, parameter); tied weights count once."""
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
            elif parameter.ndim < 2:
                vectors.append((full, parameter))
            elif type(module).__name__ == "Conv1D":
                raise RunError(
                    f"{full} is stored as (inputs, outputs); the matrix rules need (outputs, inputs)",
                    where="model.config.model_type",
                    mend="use an architecture with Linear layers, such as llama",
                )
            else:
                matrices.append((full, parameter))
    return matrices, embeddings, vectors
