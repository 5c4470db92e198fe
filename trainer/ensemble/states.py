"""What a member says about a text, kept on disk: hidden states and head, from which all its logits follow.

Members pass one after another through one model; memory holds one of them, however many there are. The files have no name,
so that nothing stays behind, even of a process that is killed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainer.data.batches import MicroBatch
from trainer.model import chunked
from trainer.model.loss import model_inputs
from trainer.outcome import Outcome, RunError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""By how much logits may differ from head times hidden states, relative to the largest."""


class Rows:
    """Rows of fp32 numbers on disk: appended, then read back in any order."""

    def __init__(self, folder: Path, width: int) -> None:
        self.width = width
        self._file: Any = tempfile.TemporaryFile(dir=folder)

    def append(self, rows: Tensor) -> None:
        """Rows (n, width)."""
        self._file.seek(0, 2)
        self._file.write(memoryview(rows.to("cpu", torch.float32).contiguous().numpy()).cast("B"))

    def read(self, start: int, stop: int) -> Tensor:
        """Rows (stop - start, width)."""
        rows = np.empty((stop - start, self.width), np.float32)
        self._file.seek(start * self.width * 4)
        if self._file.readinto(memoryview(rows).cast("B")) != rows.nbytes:
            raise OSError(f"rows {start} to {stop} are not there")
        return torch.from_numpy(rows)


class HiddenStates:
    """One member's hidden states of all of this rank's batches, end to end, and its head (a `prediction.Predictor`)."""

    def __init__(self, folder: Path, width: int, device: torch.device) -> None:
        self.states, self.weights = Rows(folder, width), Rows(folder, width)
        self.biases: Tensor | None = None
        self.device, self.offset = device, 0
        """`offset`: where the batch begins that is asked about."""

    def hidden(self, start: int, stop: int) -> Tensor:
        return self.states.read(self.offset + start, self.offset + stop).to(self.device)

    def head(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        biases = None if self.biases is None else self.biases[start:stop].to(self.device)
        return self.weights.read(start, stop).to(self.device), biases


@torch.no_grad()
def hidden_states(
    model: Any, strategy: Any, batches: Iterable[MicroBatch], folder: Path, device: torch.device
) -> HiddenStates:
    """Take all batches through a model whose weights are loaded; collective over its ranks.

    Args:
        batches: as many on every rank.
        folder: where the files without a name lie.

    Raises:
        RunError: the architecture's logits are not head times hidden states.
    """
    probe, head = None, _linear_head(model)
    found = HiddenStates(folder, head.in_features, device)
    model.eval()
    with keeping(model) as kept:
        try:
            for batch in batches:
                moved = batch.to(device)
                with strategy.context():
                    logits = strategy.forward(**model_inputs(moved.inputs, moved.positions)).logits
                if not kept:
                    raise _refused(model, "does not call its decoder")
                states = kept.pop()
                probe = probe or (states[:, 0], logits[:, 0])
                found.states.append(states.flatten(0, 1))
        finally:
            strategy.settle(model)
    weight, bias = (None if tensor is None else whole(tensor).float() for tensor in (head.weight, head.bias))
    if probe is not None:
        _compare(model, *probe, weight, bias)
    found.weights.append(weight)  # type: ignore[arg-type]
    found.biases = None if bias is None else bias.cpu()
    return found


@contextmanager
def keeping(model: Any) -> Iterator[list[Tensor]]:
    """The hidden states (rows, L, d) of every forward within, in order; the head works for one token of each row only."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
        kept.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:, :1]
        return output

    handle = chunked.decoder_of(model).register_forward_hook(keep)  # type: ignore[union-attr]
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def check_linear(model: Any, forward: Any, device: torch.device) -> None:
    """A forward of a few tokens, on all ranks alike.

    Args:
        forward: what is called in place of the model.

    Raises:
        RunError: the architecture's logits are not head times hidden states.
    """
    head, was_training = _linear_head(model), model.training
    model.eval()
    tokens = torch.arange(1, 6, device=device).remainder(model.config.vocab_size)[:, None]
    with keeping(model) as kept, torch.compiler.set_stance("force_eager"):
        logits = forward(input_ids=tokens, use_cache=False).logits
    model.train(was_training)
    if not kept:
        raise _refused(model, "does not call its decoder")
    if not head.weight.is_meta:  # offloaded: the check was made before
        weight, bias = (None if tensor is None else whole(tensor).float() for tensor in (head.weight, head.bias))
        _compare(model, kept[0][:, 0], logits[:, 0], weight, bias)


def _linear_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if chunked.decoder_of(model) is None or not isinstance(head, nn.Linear):
        raise _refused(model, "keeps no linear head apart from its decoder")
    return head


def _compare(model: Any, states: Tensor, logits: Tensor, weight: Any, bias: Tensor | None) -> None:
    product = F.linear(states.float(), weight, bias)
    difference = float((product - logits.float()).abs().max() / logits.abs().max().clamp_min(1.0))
    if not difference <= TOLERANCE.get(logits.dtype, 1e-4):
        raise _refused(model, f"changes what its linear head gives (by {difference:.1g} of the largest logit)")


def check_room(folder: Path, members: int, tokens: int, model: Any, ranks: int) -> None:
    """Refuse before the work what the disk could not take.

    Args:
        tokens: of one rank.
        ranks: that write into `folder`.

    Raises:
        RunError: there is no room.
    """
    head = model.get_output_embeddings()
    needed = 4 * members * (tokens + head.weight.shape[0]) * head.weight.shape[1] * ranks
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"hidden states and heads of {members} members need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(folder),
            mend="make room, or set --evaluate.sequences",
            outcome=Outcome.NO_SPACE,
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its shards; collective where it has some."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _refused(model: Any, what: str) -> RunError:
    return RunError(
        f"{model.config.model_type} {what}: the mean of its logits cannot be made in blocks",
        where="model.config.model_type",
        mend="use an architecture whose logits are a linear map of its hidden states",
    )
