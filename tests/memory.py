"""Counting the bytes of living tensors, and the operations that make them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainer.model.footprint import Living


class Count(Living):
    """Within it: `live` and `peak` bytes of storages made since, `largest` single one, `operations` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = super().__torch_dispatch__(operation, types, arguments, options)
        self.operations[operation.name().removeprefix("aten::").split(".")[0]] += 1
        return result

    def _track(self, storage: Any) -> None:
        super()._track(storage)
        self.largest = max(self.largest, storage.nbytes())
