"""The model of a run: its shape, its blocks, its spread over the ranks, and the micro-batch that fits beside it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from trainer import distributed, runfolder
from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.derive import Derived, derive
from trainer.metrics.progress import Progress
from trainer.model import pretrained
from trainer.model.build import architecture, build
from trainer.model.flops import flops_per_token
from trainer.model.init import allocate
from trainer.model.microbatch import largest_that_fits, micro_steps, rehearse
from trainer.model.prepare import check_compiler, prepare


@dataclass
class Made:
    """A model spread by its strategy, with storage but without values; with an optimizer if one had to be tried."""

    model: Any
    flops_per_token: int | None
    optimizer: Any = None


def open_strategy(config: RunConfig, device: torch.device, world: int) -> Any:
    """The strategy of the run, which refuses what it cannot do on these ranks before any data is prepared."""
    module = import_module(f"trainer.parallel.{config.parallel.name}")
    if config.train.compile:
        check_compiler(device)
    return module.Strategy(config.parallel, config.train.precision, device, world)


def starting_point(config: RunConfig, folder: Path) -> tuple[pretrained.Source | None, dict[str, Any] | None]:
    """The weights that a run without a checkpoint of its own starts from, and the architecture that came with them."""

    def look() -> tuple[pretrained.Source | None, dict[str, Any] | None]:
        if config.model.init_from is None:
            return None, None
        for generation in manifests.generations(folder / "checkpoints"):
            with suppress(manifests.Damaged):
                return None, manifests.read(generation).state["architecture"]
        source = pretrained.find(config.model.init_from)
        pretrained.check_vocabulary(source, folder / "tokenizer")
        return source, source.architecture()

    return distributed.on_rank_zero(look)


def shape_of(config: RunConfig, tokenizer: dict[str, Any], below: dict[str, Any] | None) -> Any:
    """The `transformers` configuration of the run's model."""
    return architecture(
        config.model,
        vocab_size=tokenizer["vocab_size"],
        bos=tokenizer["bos"],
        eos=tokenizer["eos"],
        max_length=config.data.sequence_length,
        below=below,
    )


def make(config: RunConfig, shape: Any, strategy: Any) -> Made:
    """Build the model, prepare its blocks, spread it, and give it storage."""
    model: Any = build(shape)
    flops = flops_per_token(model, config.data.sequence_length)
    strategy.shard(model, prepare(model, config.train, strategy.device))
    model.train()
    allocate(model, strategy.initial_device)
    return Made(model, flops)


def fitting(
    config: RunConfig,
    optim: Any,
    shape: Any,
    derived: Derived,
    stream: Any,
    strategy: Any,
    folder: Path,
    progress: Progress,
) -> tuple[Made, Derived]:
    """The model, and the portions of a step: those of the configuration, or under `auto` the largest that fit.

    Args:
        optim: the optimizer's options, with every weight decay settled.
    """
    world, made = distributed.world(), None

    def attempt(rows: int) -> list[int]:
        nonlocal made
        made = None  # the one that ran out of memory must be gone before the next is made
        strategy.forward = None
        made = distributed.together(lambda: make(config, shape, strategy))
        with torch.no_grad():
            for tensor in (*made.model.parameters(), *made.model.buffers()):
                tensor.zero_()
        current = made
        current.optimizer = distributed.together(lambda: strategy.optimizer(current.model, optim))
        strategy.connect(current.model, current.optimizer)
        count = min(2, derive(config, world, stream, rows).micro_steps)
        out = rehearse(strategy, current.model, lambda: micro_steps(current.model, strategy, config, rows, count))
        made = None if out else made
        return out

    def say(text: str) -> None:
        progress.say(text)
        if distributed.rank() == 0:
            runfolder.record_event(folder, "micro batch", message=text)

    if config.train.micro_batch_size != "auto":
        return distributed.together(lambda: make(config, shape, strategy)), derived
    rows = largest_that_fits(derived.rows, attempt, say)
    assert made is not None
    return made, derive(config, world, stream, rows)
