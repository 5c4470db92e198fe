"""FSDP2's exchange on CPUs, beside the arithmetic instead of before and after it.

FSDP2 overlaps by CUDA streams, which a CPU has not: there each of its collectives is waited for at once, and gloo
reduces and scatters by an all-reduce of everything. Here all-gathers return at once, one block ahead; gradients travel by
an all-to-all of what each rank needs, and are summed, in the order of the ranks, when the backward is over. Weights,
gradients and losses are the same to the bit on two ranks, and to rounding on more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class Gather:
    """All-gather for `set_custom_all_gather`; FSDP2 waits for the work it returns where it needs the weights."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return _gather(output_tensor, input_tensor, group=group, async_op=True)


class ReduceScatter:
    """Reduce-scatter for `set_custom_reduce_scatter`, whose sums may be made later.

    FSDP2 makes gradients of views of the output, and reads it at once only where it adds to gradients of an earlier
    micro-step, or goes on to other replicas: there `deferred` must be False.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._pending: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op != dist.ReduceOp.SUM:
            raise AssertionError(f"gradients are summed, not reduced by {op}")
        pieces = torch.empty_like(input_tensor)
        work = dist.all_to_all_single(pieces, input_tensor, group=group, async_op=True)
        # The input is kept until it has left.
        self._pending.append((work, input_tensor, pieces.view(group.size(), -1), output_tensor))
        if not self.deferred:
            self.finish()

    def finish(self) -> None:
        """Make all outputs what they should be."""
        for work, _, pieces, output in self._pending:
            work.wait()
            torch.sum(pieces, dim=0, out=output)
        self._pending.clear()


def install(wrapped: list[Any], chain: list[Any]) -> ReduceScatter:
    """Give all FSDP2 modules these collectives; `chain` is the root and the blocks in the order of their forwards."""
    reduce = ReduceScatter()
    use(wrapped, reduce)
    for module, following in itertools.pairwise(chain):
        module.set_modules_to_forward_prefetch([following])
    return reduce


def use(wrapped: list[Any], reduce: ReduceScatter) -> None:
    """Let FSDP2 modules gather, and reduce, by these."""
    gather = Gather()
    for module in wrapped:
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(reduce)
