"""One process, whole parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.outcome import RunError
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One process; no sharding."""

    __pydantic_config__ = STRICT
    name: Literal["single"] = "single"


def shard(model: Any, blocks: list[Any], options: Options, precision: str, device: Any, world: int) -> Any:
    """Nothing to shard."""
    if world > 1:
        raise RunError(
            f"parallel.name is single and there are {world} ranks",
            where="parallel.name",
            mend="use fsdp2, or resources.ranks: 1",
        )
    return model


def synchronize_gradients(model: Any, options: Options, *, last: bool) -> None:
    """Nothing to synchronize."""


def forward_context(precision: str, device: Any) -> Any:
    """Arithmetic in bf16 by autocast; weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def settle(model: Any) -> None:
    """Nothing was gathered."""
