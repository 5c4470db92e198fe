"""What a member says about a text, kept on disk: hidden states and head, from which all its logits follow.

Members pass one after another through one model; memory holds one of them, however many there are. The files have no name,
so that nothing stays behind, even of a process that is killed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
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
    decoder, head = chunked.decoder_of(model), model.get_output_embeddings()
    if decoder is None or not isinstance(head, nn.Linear):
        raise _refused(model, "keeps no linear head apart from its decoder")
    found = HiddenStates(folder, head.in_features, device)
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
        kept.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:, :1]  # the head works for one token of each row only
        return output

    handle, probe = decoder.register_forward_hook(keep), None
    model.eval()
    try:
        for batch in batches:
            moved = batch.to(device)
            with strategy.context():
                logits = strategy.forward(**model_inputs(moved.inputs, moved.positions)).logits
            if not kept:
                raise _refused(model, "does not call its decoder")
            states = kept.pop()
            probe = probe or (states[:, 0].float(), logits[:, 0])
            found.states.append(states.flatten(0, 1))
    finally:
        handle.remove()
        strategy.settle(model)
    weight, bias = (None if tensor is None else _whole(tensor).float() for tensor in (head.weight, head.bias))
    if probe is not None:
        product = F.linear(probe[0], weight, bias)  # type: ignore[arg-type]
        difference = float((product - probe[1].float()).abs().max() / probe[1].abs().max().clamp_min(1.0))
        if not difference <= TOLERANCE.get(probe[1].dtype, 1e-4):
            raise _refused(model, f"changes what its linear head gives (by {difference:.1g} of the largest logit)")
    found.weights.append(weight)  # type: ignore[arg-type]
    found.biases = None if bias is None else bias.cpu()
    return found


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


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _refused(model: Any, what: str) -> RunError:
    return RunError(
        f"{model.config.model_type} {what}: the mean of its logits cannot be made in blocks",
        where="model.config.model_type",
        mend="use an architecture whose logits are a linear map of its hidden states",
    )
