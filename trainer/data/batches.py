"""A batch as a pure function of the position: which rows, on which rank, in which micro-step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.order import sequence_ids
from trainer.data.table import Split

MASKED = -100


class Batches:
    """The batches of one rank.

    Row i of micro-step j on rank r is sequence (j * world + r) * rows + i of the step. Every rank runs the same number
    of micro-steps; where sequences run out, rows are fully masked.
    """

    def __init__(
        self, split: Split, order_seed: int | None, rank: int, world: int, rows: int, micro_steps: int
    ) -> None:
        self.split, self.order_seed = split, order_seed
        self.rank, self.world, self.rows, self.micro_steps = rank, world, rows, micro_steps

    def ids(self, position: int, count: int) -> NDArray[np.int64]:
        """Ids of the sequences of a step, in the order of the stream; natural order without a seed."""
        if self.order_seed is None:
            if position + count > self.split.sequences:
                raise ValueError(f"sequence {position + count - 1} is beyond the split's {self.split.sequences}")
            return np.arange(position, position + count, dtype=np.int64)
        return sequence_ids(position, count, self.split.sequences, self.order_seed)

    def at(self, position: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's (inputs, targets), each (rows, L) int64, for every micro-step of a step of `count` sequences."""
        room = self.world * self.rows * self.micro_steps
        if count > room:
            raise ValueError(f"{count} sequences do not fit the {room} rows of a step")
        ids = self.ids(position, count)
        places = np.concatenate(
            [np.arange(self.rows) + (j * self.world + self.rank) * self.rows for j in range(self.micro_steps)]
        )
        real = places < count
        # Row 0 of the split gives the masked rows their shape, also in a step without sequences.
        tokens, _ = self.split.rows(np.concatenate([ids, [0]])[np.where(real, places, count)])
        tokens[~real] = 0
        inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
        targets[~torch.from_numpy(real)] = MASKED
        return list(zip(inputs.split(self.rows), targets.split(self.rows), strict=True))

    def bytes(self, position: int, count: int) -> int:
        """Bytes of text behind the targets of these sequences, over all ranks."""
        return sum(
            int(self.split.rows(part)[1].sum()) for part in np.array_split(self.ids(position, count), count // 4096 + 1)
        )
