"""Optimizers for sharded parameters, as a library: `from trainer.optim import NorMuon, build_optimizer`.

Loads torch only when a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.optim.groups import build_optimizer as build_optimizer
    from trainer.optim.library import ROOT as ROOT
    from trainer.optim.library import AdamW as AdamW
    from trainer.optim.library import AuON as AuON
    from trainer.optim.library import DCTAdamW as DCTAdamW
    from trainer.optim.library import HybridAuON as HybridAuON
    from trainer.optim.library import Muon as Muon
    from trainer.optim.library import NorMuon as NorMuon
    from trainer.optim.library import Trion as Trion
    from trainer.optim.sharded import ShardedOptimizer as ShardedOptimizer

_HOMES = {
    "AdamW": "trainer.optim.library",
    "AuON": "trainer.optim.library",
    "DCTAdamW": "trainer.optim.library",
    "HybridAuON": "trainer.optim.library",
    "Muon": "trainer.optim.library",
    "NorMuon": "trainer.optim.library",
    "ROOT": "trainer.optim.library",
    "Trion": "trainer.optim.library",
    "ShardedOptimizer": "trainer.optim.sharded",
    "build_optimizer": "trainer.optim.groups",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer.optim' has no attribute '{name}'")
