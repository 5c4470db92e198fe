"""Optimizers for sharded parameters, as a library: `from trainer.optim import NorMuon, build_optimizer`.

Loads torch only when a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.optim.groups import build_optimizer as build_optimizer
    from trainer.optim.library import AdamW as AdamW
    from trainer.optim.library import Muon as Muon
    from trainer.optim.library import NorMuon as NorMuon
    from trainer.optim.sharded import ShardedOptimizer as ShardedOptimizer

_HOMES = {
    "AdamW": "trainer.optim.library",
    "Muon": "trainer.optim.library",
    "NorMuon": "trainer.optim.library",
    "ShardedOptimizer": "trainer.optim.sharded",
    "build_optimizer": "trainer.optim.groups",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer.optim' has no attribute '{name}'")
