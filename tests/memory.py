"""Counting the bytes of living tensors, and the operations that make them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """Within it: `live` and `peak` bytes of storages made since, `largest` single one, `operations` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.operations: Counter[str] = Counter()
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)
        }
        result = operation(*arguments, **(options or {}))
        self.operations[operation.name().removeprefix("aten::").split(".")[0]] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in given:
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
