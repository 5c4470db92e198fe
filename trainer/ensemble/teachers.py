"""Live teachers: the frozen members of an ensemble, which answer for the tokens of a batch.

They are models of their own beside the one that trains: without gradients, in no optimizer, gradient norm or checkpoint.
Under FSDP2 they are sharded over all ranks, and freed after each forward, root included; else every rank holds them whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.checkpoint.load import load
from trainer.data.batches import MicroBatch
from trainer.ensemble import manifest
from trainer.ensemble.states import check_linear, keeping, whole
from trainer.ensemble.targets import Dense, Heads
from trainer.model.build import blocks, build, from_json, model_tensors
from trainer.model.init import allocate, initialize
from trainer.model.loss import model_inputs
from trainer.outcome import RunError
from trainer.parallel import fsdp2


def resolve(runs: Path, name: str) -> manifest.Ensemble:
    """The ensemble of a name, or the ensemble of one that the newest checkpoint of the run of this name is.

    Raises:
        RunError: there is neither, or a member is missing or corrupt.
    """
    if (manifest.folder_of(runs, name) / manifest.FILE).exists():
        return manifest.read(runs, name)
    if not (runs / name / "config.yaml").exists():
        raise RunError(
            f"there is no ensemble and no run {name}",
            where=f"distill.teacher, {runs}",
            mend="name one that is there: `orthogon list`, `orthogon ensemble make`",
        )
    return manifest.make(name, runs, [name], manifest.RULES[0])


def check_vocabulary(ensemble: manifest.Ensemble, tokenizer: dict[str, Any]) -> None:
    """Teacher and student speak of the same tokens.

    Raises:
        RunError: they do not.
    """
    if ensemble.tokenizer_sha256 != tokenizer["tokenizer_digest"]:
        raise RunError(
            f"teacher {ensemble.name} has another tokenizer ({ensemble.tokenizer_sha256[:12]}) than the data "
            f"({tokenizer['tokenizer_digest'][:12]})",
            where="distill.teacher, data.tokenizer",
            mend="give data.tokenizer.path: tokenizer/ of one of the teacher's runs",
        )
    if ensemble.vocab_size != tokenizer["vocab_size"]:
        raise RunError(
            f"teacher {ensemble.name} has {ensemble.vocab_size} tokens, and the data {tokenizer['vocab_size']}",
            where="distill.teacher, data.tokenizer",
            mend="use the tokenizer of the teacher's runs",
        )


class Members:
    """The members of an ensemble on this rank's device; made by all ranks together.

    Args:
        precision: "fp32" or "bf16", of their arithmetic.
        sharded: spread over all ranks by FSDP2.
        offload: where weights wait ("cpu" or "disk") until a layer needs them, by accelerate; None keeps them on the device.
        scratch: a folder for those on disk.

    Raises:
        RunError: a member is missing, corrupt, another one than the ensemble was made of, or its logits are not head
            times hidden states.
    """

    def __init__(
        self, runs: Path, ensemble: manifest.Ensemble, precision: str, device: torch.device, *, sharded: bool,
        offload: str | None = None, scratch: Path | None = None,
    ) -> None:  # fmt: skip
        self.ensemble, self.precision, self.device, self.sharded = ensemble, precision, device, sharded
        self._heads: Heads | None = None
        checkpoints = distributed.on_rank_zero(lambda: manifest.open_members(runs, ensemble))
        mesh = fsdp2.mesh_of(device, distributed.world()) if sharded else None
        self.models = []
        for path, one in checkpoints:
            model: Any = build(from_json(one.state["architecture"]))
            here = torch.device("cpu") if offload else device
            if mesh is not None:
                fsdp2.shard_frozen(model, blocks(model), mesh, precision)
            allocate(model, here)
            initialize(model, 0, here, weights=False)
            load(path, one, model_tensors(model), prefix="model.")
            model.requires_grad_(False).eval()
            self.models.append(model)
        if offload is not None:
            self.heads()  # before their weights are moved away
            for index, model in enumerate(self.models):
                _offload(model, offload, device, scratch, index)
        with self._context():
            for model in self.models:
                distributed.together(lambda model=model: check_linear(model, model, device))

    @torch.no_grad()
    def answer(self, batch: MicroBatch) -> Dense:
        """What they say about every token of a batch; collective where they are sharded."""
        states = []
        for model in self.models:
            with keeping(model) as kept, self._context():
                model(**model_inputs(batch.inputs, batch.positions))
            states.append(kept.pop().flatten(0, 1))
        return Dense(torch.cat(states, 1), self.heads())

    @torch.no_grad()
    def heads(self) -> Heads:
        """All heads side by side; gathered anew where they are sharded, and free again after the step that asked."""
        if self._heads is not None:
            return self._heads
        first = self.models[0].get_output_embeddings()
        columns, width = first.weight.shape
        count, compute = len(self.models), torch.bfloat16 if self.precision == "bf16" else first.weight.dtype
        matrix = torch.empty(columns, count * width, dtype=compute, device=self.device)
        biases = None if first.bias is None else torch.empty(columns, count, device=self.device)
        for index, model in enumerate(self.models):
            head = model.get_output_embeddings()
            matrix[:, index * width : (index + 1) * width] = whole(head.weight.to(compute))
            if biases is not None:
                biases[:, index] = whole(head.bias)
        found = Heads(matrix, biases, count, self.ensemble.vocab_size, self.ensemble.rule == manifest.RULES[1])
        if not self.sharded:
            self._heads = found
        return found

    def _context(self) -> AbstractContextManager[Any]:
        """FSDP2 casts by itself."""
        if self.sharded:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _offload(model: Any, where: str, device: torch.device, scratch: Path | None, index: int) -> None:
    """Let accelerate move the weights of a layer to the device when it is called, and away after it."""
    from accelerate import cpu_offload, disk_offload

    if where == "cpu":
        cpu_offload(model, execution_device=device, offload_buffers=False)
        return
    assert scratch is not None
    disk_offload(model, str(scratch / str(index)), execution_device=device, offload_buffers=False)
