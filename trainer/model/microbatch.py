"""`train.micro_batch_size: auto`: the most sequences that fit into every rank's memory, found before training.

A rehearsal takes the largest micro-batch through forward and backward on weights without values. Where a rank runs out
of memory all ranks halve it: each asks before every collective of FSDP2 whether a rank is out, so that none waits for
one that has left. The loss is a sum over the tokens of the step, so the size changes the update by rounding only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from trainer import distributed
from trainer.model.loss import losses
from trainer.outcome import Outcome, RunError


class Elsewhere(Exception):
    """Another rank ran out of memory."""


class Watch:
    """Agreement of all ranks, before each collective, that none is out of memory."""

    def __init__(self) -> None:
        self.on = True

    def ask(self, out: bool = False) -> None:
        """Tell whether this rank is out of memory.

        Raises:
            Elsewhere: another rank is, and this one is not.
        """
        if self.on and distributed.sum_over_ranks([float(out)], torch.device("cpu"))[0] and not out:
            raise Elsewhere


class _Collective:
    """An all-gather or reduce-scatter of FSDP2 that asks first."""

    def __init__(self, watch: Watch, run: Callable[..., Any]) -> None:
        self.watch, self.run = watch, run

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, *rest: Any, **options: Any) -> Any:
        self.watch.ask()
        return self.run(output_tensor, input_tensor, *rest, group=group, **options)


def rehearse(strategy: Any, model: Any, run_micro_steps: Callable[[], None]) -> list[int]:
    """Run forwards and backwards; returns the ranks that ran out of memory. If there are any, the model is spoilt."""
    watch = Watch()
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_custom_all_gather(_Collective(watch, dist.all_gather_into_tensor))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(_Collective(watch, dist.reduce_scatter_tensor))  # type: ignore[arg-type]
    out = False
    try:
        run_micro_steps()
        watch.ask()
    except Elsewhere:
        pass
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        out = True
    if out:
        watch.ask(out=True)
    watch.on = False
    strategy.use_own_collectives(model)
    answers: list[bool] = [False] * distributed.world()
    dist.all_gather_object(answers, out)
    return [rank for rank, answer in enumerate(answers) if answer]


def micro_steps(model: Any, strategy: Any, config: Any, rows: int, count: int) -> None:
    """`count` forwards and backwards of `rows` sequences, as training does them; their gradients are dropped."""
    tokens = torch.zeros(rows, config.data.sequence_length, dtype=torch.long, device=strategy.device)
    watched = not isinstance(
        strategy.forward, DistributedDataParallel
    )  # DDP's reductions are left out: they need no memory
    for index in range(count):
        strategy.synchronize(last=watched and index == count - 1)
        with strategy.context():
            _, objective = losses(strategy.forward, tokens, tokens)
        strategy.backward(objective)
    strategy.clear(list(model.parameters()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, is at its end."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


def largest_that_fits(bound: int, attempt: Callable[[int], list[int]], say: Callable[[str], None]) -> int:
    """The first of `bound`, a half, a quarter ... that no rank runs out of memory with.

    Args:
        attempt: tries so many sequences and returns the ranks that ran out; whatever it made must be gone after it.

    Raises:
        RunError: not even one sequence fits.
    """
    rows = bound
    while True:
        out = attempt(rows)
        if not out:
            return rows
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        where = f"rank{'s' if len(out) > 1 else ''} {', '.join(map(str, out))}"
        if rows == 1:
            raise RunError(
                f"{where} ran out of memory with one sequence",
                where="train.micro_batch_size",
                mend="use more ranks, train.activation_checkpointing: full, train.loss_chunk, or shorter sequences",
                outcome=Outcome.BAD_CONFIGURATION,
            )
        say(f"{where} ran out of memory with {rows} sequences per micro-step; trying {-(-rows // 2)}")
        rows = -(-rows // 2)
