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


class DCTAdamW(ShardedOptimizer):
    """AdamW on the best columns of matrices in a cosine basis; see `trainer.optim.dct_adamw`, `ShardedOptimizer` for
    `engine`. `rank` is a number of columns, or a share of the short side."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, rank: float = 0.25, refresh: int = 1, beta1: float = 0.9,
        beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0, norm: str = "l2", transform: str = "auto",
        error_feedback: str = "none", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "rank": rank, "refresh": refresh, "beta1": beta1, "beta2": beta2, "eps": eps,
            "weight_decay": weight_decay, "norm": norm, "transform": transform, "error_feedback": error_feedback,
        }  # fmt: skip
        super().__init__(_groups(params, "dct_adamw", options), **engine)


class Trion(ShardedOptimizer):
    """Muon on the best columns of the momentum in a cosine basis; see `trainer.optim.trion`, `ShardedOptimizer` for
    `engine`. `rank` is a number of columns, or a share of the short side."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, rank: float = 0.25, momentum: float = 0.95,
        weight_decay: float = 0.0, scale: str = "rms", polar: str = "polar-express", norm: str = "l2",
        transform: str = "auto", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "rank": rank, "momentum": momentum, "weight_decay": weight_decay, "scale": scale, "polar": polar,
            "norm": norm, "transform": transform,
        }  # fmt: skip
        super().__init__(_groups(params, "trion", options), **engine)


class ROOT(ShardedOptimizer):
    """Muon on clipped momentum; see `trainer.optim.root` for the rule and its source, `ShardedOptimizer` for `engine`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, momentum: float = 0.95, nesterov: bool = False,
        quantile: float = 0.9, clip: str = "always", outlier: float = 6.0, scale: str = "rms",
        weight_decay: float = 0.0, cautious: bool = False, polar: str = "fitted", polar_dtype: str = "auto",
        polar_form: str = "standard", polar_prescale: str = "frobenius", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "quantile": quantile, "clip": clip, "outlier": outlier,
            "scale": scale, "weight_decay": weight_decay, "cautious": cautious, "polar": polar,
            "polar_dtype": polar_dtype, "polar_form": polar_form, "polar_prescale": polar_prescale,
        }  # fmt: skip
        super().__init__(_groups(params, "root", options), **engine)


class AuON(ShardedOptimizer):
    """Normalized momentum; see `trainer.optim.auon` for the rule and its source, `ShardedOptimizer` for `engine`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, momentum: float = 0.95, nesterov: bool = False,
        mode: str = "paper", weight_decay: float = 0.0, cautious: bool = False, **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "mode": mode, "weight_decay": weight_decay,
            "cautious": cautious,
        }  # fmt: skip
        super().__init__(_groups(params, "auon", options), **engine)


class HybridAuON(ShardedOptimizer):
    """Some Newton-Schulz steps, then AuON's normalization; see `trainer.optim.hybrid_auon`, `ShardedOptimizer` for `engine`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 2e-3, momentum: float = 0.95, nesterov: bool = False, steps: int = 1,
        mode: str = "paper", weight_decay: float = 0.0, cautious: bool = False, polar: str = "simple",
        polar_dtype: str = "auto", polar_form: str = "standard", **engine: Any,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "steps": steps, "mode": mode,
            "weight_decay": weight_decay, "cautious": cautious, "polar": polar, "polar_dtype": polar_dtype,
            "polar_form": polar_form,
        }  # fmt: skip
        super().__init__(_groups(params, "hybrid_auon", options), **engine)
