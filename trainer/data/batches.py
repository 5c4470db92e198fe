"""A batch as a pure function of the position: which rows, on which rank, in which micro-step."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.masking import Borders, crossing, position_ids

MASKED = -100


class MicroBatch(NamedTuple):
    """What a rank takes through the model at once."""

    inputs: Tensor
    """(rows, L) token ids, int64."""
    targets: Tensor
    """(rows, L) next token ids, `MASKED` where nothing is predicted, int64."""
    positions: Tensor | None
    """(rows, L) places of the inputs in their documents, int64, with document masking; else None."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return MicroBatch(self.inputs.to(device), self.targets.to(device), positions)


class Sequences(Protocol):
    """Rows of L + 1 tokens by position: a stream, or a split in its natural order."""

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

    def bytes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Batches:
    """The batches of one rank.

    Row i of micro-step j on rank r is sequence (j * world + r) * rows + i of the step. Every rank runs the same number
    of micro-steps; where sequences run out, rows are fully masked. With `borders`, documents are kept apart.
    """

    def __init__(
        self, sequences: Sequences, rank: int, world: int, rows: int, micro_steps: int, borders: Borders | None = None
    ) -> None:
        self.sequences, self.borders = sequences, borders
        self.rank, self.world, self.rows, self.micro_steps = rank, world, rows, micro_steps

    def at(self, position: int, count: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step of `count` sequences."""
        places, real = self._places(position, count)
        tokens, _ = self.sequences.rows(places)
        tokens[~real] = 0
        targets = tokens[:, 1:].copy()
        targets[~real] = MASKED
        positions = [None] * self.micro_steps
        if self.borders is not None:
            targets[crossing(tokens, self.borders)] = MASKED
            positions = torch.from_numpy(position_ids(tokens[:, :-1], self.borders)).split(self.rows)
        inputs = torch.from_numpy(tokens[:, :-1].copy())
        pairs = zip(inputs.split(self.rows), torch.from_numpy(targets).split(self.rows), positions, strict=True)
        return [MicroBatch(*parts) for parts in pairs]

    def places(self, position: int, count: int) -> list[NDArray[np.int64]]:
        """The position in the stream of each row of these micro-batches; 0 for masked rows."""
        return list(self._places(position, count)[0].reshape(self.micro_steps, self.rows))

    def _places(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions in the stream, and which rows have one; sequence 0 gives the others, which are masked, their shape."""
        room = self.world * self.rows * self.micro_steps
        if count > room:
            raise ValueError(f"{count} sequences do not fit the {room} rows of a step")
        places = np.concatenate(
            [np.arange(self.rows) + (j * self.world + self.rank) * self.rows for j in range(self.micro_steps)]
        )
        real = places < count
        return np.where(real, position + places, 0), real

    def bytes(self, position: int, count: int) -> int:
        """Bytes of text behind the targets of these sequences, over all ranks."""
        return int(self.sequences.bytes(np.arange(position, position + count)).sum())
