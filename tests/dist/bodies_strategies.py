"""What ranks run in the tests of the strategies."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from tests.dist import bodies, bodies_run
from trainer import config as configuration
from trainer import loop
from trainer.model.loss import summed_loss
from trainer.outcome import RunError
from trainer.parallel import fsdp2, partitions, single


def own_matrices(options: Any) -> int:
    """How many matrices this rank orthogonalizes."""
    model, strategy = bodies.spread_model_of(options)
    raw = {
        "name": "t", "model": {"config": bodies.LLAMA}, "data": {"path": "stdlib"}, "optim": {"name": "normuon"},
        "train": {"length": "1 steps", "tokens_per_step": 1024}, "parallel": {"name": "single"},
    }  # fmt: skip
    optimizer = strategy.optimizer(model, configuration.parse(raw).optim)
    dist.barrier()
    return sum(len(bucket.route(("matrix",)).mine) for _, _, bucket in optimizer._buckets)


def overlap_changes_nothing(options: Any, accumulation: int) -> bool:
    """Whether gradients under our collectives for CPUs equal those under torch's to the bit, and were not torch's."""
    found, ours = [], []
    for install in (fsdp2.overlap.install, lambda wrapped, chain: None):
        with mock.patch.object(fsdp2.overlap, "install", install):
            model, strategy = bodies.spread_model_of(options)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for micro in range(accumulation):
            tokens = torch.randint(0, bodies.VOCABULARY, (2, bodies.LENGTH), generator=generator)
            strategy.synchronize(last=micro == accumulation - 1)
            strategy.backward(summed_loss(strategy.forward, tokens, tokens))
        found.append([p.grad.to_local().clone() for p in model.parameters()])
        ours.append(strategy.reductions is not None)
    return ours == [True, False] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def disagreeing(path: str, overrides: list[str], about: str) -> str:
    """What a rank hears when the last rank differs in its configuration, its rates, or the gradients it has."""
    last = dist.get_rank() == dist.get_world_size() - 1
    true_rates, true_missing = loop.set_learning_rate, single.Strategy.missing

    def rates(run: Any) -> float:
        factor = true_rates(run)
        run.optimizer.param_groups[0]["lr"] *= 1.0 + 1e-6 * (last and run.step == 1)
        return factor

    def without(self: Any, parameters: list[Any], names: dict[Any, str]) -> Any:
        if last:
            parameters[3].grad = None
        return true_missing(self, parameters, names)

    patch = {
        "configuration": nullcontext(),
        "rates": mock.patch.object(loop, "set_learning_rate", rates),
        "gradients": mock.patch.object(single.Strategy, "missing", without),
    }[about]
    mine = ["--optim.weight_decay=0.2"] if last and about == "configuration" else []
    try:
        with patch:
            result = bodies_run.train(path, [*overrides, *mine])
    except RunError as error:
        return str(error)
    return str(result.get("error", "none"))


def without_a_compiler(path: str, overrides: list[str]) -> str:
    """What a rank hears that is to compile where there is no C++ compiler."""
    nowhere = (None, "/nowhere/g++")
    with mock.patch.object(inductor.cpp, "cxx", nowhere), mock.patch.dict("os.environ", {"CXX": nowhere[1]}):
        return str(bodies_run.train(path, ["--train.compile=true", *overrides]).get("error", "none"))


def meshes_of(path: str, overrides: list[str]) -> int:
    """How many meshes a run under DeepSpeed makes for its checkpoints."""
    with mock.patch.object(partitions, "init_device_mesh", wraps=partitions.init_device_mesh) as made:
        bodies_run.train(path, overrides)
    return made.call_count


def compiled(path: str, overrides: list[str], backend: str) -> dict[str, Any]:
    """Train with compiled blocks; `graphs` is how many pieces of the program the compiler took."""
    torch.compiler.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        result = bodies_run.train(path, ["--train.compile=true", *overrides])
    return {**result, "graphs": counters["stats"]["unique_graphs"]}
