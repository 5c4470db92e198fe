"""What ranks do with models of many architectures. Imported by spawned processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from tests.dist import bodies_run
from tests.dist.bodies import fingerprint, whole
from tests.models import ARCHITECTURES
from trainer import config as configuration
from trainer import assembly, runfolder, setup
from trainer.guard.heartbeat import Heartbeat
from trainer.guard.signals import Flag
from trainer.guard.watchdog import Watchdog
from trainer.outcome import RunError


def train(path: str, name: str, *overrides: str) -> dict[str, Any]:
    """Train a tiny model of an architecture."""
    return bodies_run.train(path, [f"--model.config={ARCHITECTURES[name]!r}", *overrides])


def compiled(path: str, *overrides: str) -> dict[str, Any]:
    """Train with compiled blocks, by the tracing half of the compiler alone."""
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        return train(path, "llama", "--train.compile=true", *overrides)


def start(path: str, overrides: list[str]) -> dict[str, Any]:
    """Set a run up and end: fingerprints of its weights, or the sentence that refuses it."""
    config = configuration.load(Path(path), overrides)
    if dist.get_rank() == 0:
        runfolder.create(config, ["test"])
        runfolder.new_attempt(config.folder)
    dist.barrier()
    try:
        run = setup.set_up(config.folder, config, 1, Watchdog(Heartbeat(None), Flag(), config.folder, 0))
    except RunError as error:
        return {"error": str(error)}
    tensors = {name: tensor for name, tensor in run.tensors().items() if name.startswith("model.")}
    return {"tensors": fingerprint(tensors), "step": run.step, "architecture": run.architecture, "lineage": run.lineage()}


def groups_of(path: str, name: str) -> dict[str, list[str]]:
    """The labels of the optimizer's groups with the names of their parameters, and what moved in one step of gradients."""
    overrides = [f"--model.config={ARCHITECTURES[name]!r}", f"--name=groups-{name.replace(', ', '-')}"]
    config = configuration.load(Path(path), overrides)
    from trainer.model.build import architecture
    from trainer.optim import build_optimizer

    shape = architecture(config.model, vocab_size=301, bos=0, eos=1, max_length=16)
    strategy = assembly.open_strategy(config, torch.device("cpu"), dist.get_world_size())
    made = assembly.make(config, shape, strategy)
    optimizer = build_optimizer(made.model, config.optim)
    names = {parameter: key for key, parameter in made.model.named_parameters()}
    found: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["label"], []).extend(names[p] for p in group["params"])
    return found


class _Fails(torch.autograd.Function):
    """Runs out of memory in the backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("injected")


def short_of_memory(path: str, name: str, where: str, most: int, overrides: list[str]) -> dict[str, Any]:
    """Train with `train.micro_batch_size: auto`, on a last rank that runs out of memory with more than `most` rows.

    `where`: in the `forward` of the second block, in its `backward`, or `never`.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP

    true, seen = LlamaMLP.forward, []
    last = dist.get_rank() == dist.get_world_size() - 1

    def limited(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[0])
        if last and hidden.shape[0] > most and where != "never" and torch.is_grad_enabled():
            if where == "forward":
                raise torch.OutOfMemoryError("injected")
            return _Fails.apply(true(self, hidden))
        return true(self, hidden)

    said: list[str] = []
    with mock.patch.object(LlamaMLP, "forward", limited), mock.patch.object(
        setup.Progress, "say", lambda self, text: said.append(text)
    ):
        result = bodies_run.train(path, ["--train.micro_batch_size=auto", f"--name={name}", *overrides])
    return {**result, "said": [text for text in said if "memory" in text], "rows": sorted(set(seen))}


def bug_in_rehearsal(path: str) -> str:
    """An error that is none of memory leaves the rehearsal as it is."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def broken(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("another error")

    with mock.patch.object(LlamaMLP, "forward", broken):
        try:
            bodies_run.train(path, ["--train.micro_batch_size=auto", "--name=bug"])
        except RuntimeError as error:
            return str(error)
    return "none"


def logits_of(path: str) -> torch.Tensor:
    """Not used by ranks: the logits of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(16)[None], use_cache=False).logits
    return whole(logits)
