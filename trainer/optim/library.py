"""Thin classes for use in any loop: `NorMuon(model.layers.parameters(), lr=2e-3)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trainer.optim.sharded import ShardedOptimizer


def _groups(params: Iterable[Any], rule: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(params, Tensor):
        raise TypeError("give the optimizer an iterable of tensors, not one tensor")
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    return [{"rule": rule, **options, **group} for group in groups]


class AdamW(ShardedOptimizer):
    """AdamW with fp32 moments on local shards; see `trainer.optim.adamw`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_groups(params, "adamw", options))


class Muon(ShardedOptimizer):
    """Muon on matrices; see `trainer.optim.muon` for the rule and its source, `ShardedOptimizer` for `engine`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, momentum: float = 0.95, nesterov: bool = False,
        scale: str = "rms", weight_decay: float = 0.0, cautious: bool = False, polar: str = "polar-express",
        polar_dtype: str = "auto", polar_form: str = "standard", polar_prescale: str = "frobenius", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "scale": scale, "weight_decay": weight_decay,
            "cautious": cautious, "polar": polar, "polar_dtype": polar_dtype, "polar_form": polar_form,
            "polar_prescale": polar_prescale,
        }  # fmt: skip
        super().__init__(_groups(params, "muon", options), **engine)


class NorMuon(ShardedOptimizer):
    """NorMuon on matrices; see `trainer.optim.normuon` for the rule and its source, `ShardedOptimizer` for `engine`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, momentum: float = 0.95, beta2: float = 0.95,
        nesterov: bool = False, eps: float = 1e-8, scale: str = "rms", weight_decay: float = 0.0,
        cautious: bool = False, axis: str = "rows", restore: str = "exact", polar: str = "polar-express",
        polar_dtype: str = "auto", polar_form: str = "standard", polar_prescale: str = "frobenius", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "momentum": momentum, "beta2": beta2, "nesterov": nesterov, "eps": eps, "scale": scale,
            "weight_decay": weight_decay, "cautious": cautious, "axis": axis, "restore": restore, "polar": polar,
            "polar_dtype": polar_dtype, "polar_form": polar_form, "polar_prescale": polar_prescale,
        }  # fmt: skip
        super().__init__(_groups(params, "normuon", options), **engine)
