"""Saving in the background: training waits for a copy of all tensors in CPU memory, and not for the disk.

The copy and the write are the same `save` as in the foreground, on copied tensors, in one thread, with collectives over a
process group of its own: the ranks' threads talk to each other while the ranks' training does.

Of PyTorch's own stagings, `_offload_state_dict_to_cpu` does not copy what is on the CPU already (the file would hold weights
of later steps), `StateDictStager` copies the whole storage of every view and the device mesh with each DTensor, and keeps
all of it between saves; hence the one line of `snapshot`.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import distributed
from trainer.checkpoint.save import save, temporary_name, told
from trainer.guard.faults import fault


class Background:
    """Saves of a run, one at a time. Making it is collective over all ranks, and so are `start` and `finish`."""

    def __init__(self, patience: timedelta = timedelta(minutes=30)) -> None:
        """
        Args:
            patience: how long a rank's save waits for those of the others.
        """
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self._thread: threading.Thread | None = None
        self._result: Path | BaseException | None = None
        self.writing = ""
        """The name of the temporary folder that a save is writing; pruning must leave it alone."""

    def start(self, checkpoints: Path, step: int, position: int, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Begin a save with the arguments of `save`; the tensors may change when this returns.

        A save that is under way is waited for first. Call `finish` before, to learn how it ended.

        Raises:
            RunError: the save before this one failed; then nothing was started.
        """
        self.finish()
        copies = snapshot(tensors)
        self.writing = temporary_name(step, facts["attempt"])
        # No daemon: the process does not exit in the middle of a save.
        self._thread = threading.Thread(
            target=self._save, args=(checkpoints, step, position, copies), kwargs=facts, name=f"save of step {step}"
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether no save is under way on this rank; others may still be at it."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path | None:
        """Wait for the save that is under way; returns its folder, or nothing where none was begun since the last call.

        Raises:
            RunError: it failed, on all ranks alike, as `save` would have.
        """
        if self._thread is None:
            return None
        self._thread.join()
        result, self._thread, self._result, self.writing = self._result, None, None, ""
        if isinstance(result, BaseException):
            raise result
        return result

    def _save(self, checkpoints: Path, step: int, position: int, tensors: dict[str, Tensor], **facts: Any) -> None:
        def begin() -> None:
            with told(step, checkpoints / self.writing):
                fault("save.background")

        try:
            distributed.together(begin, self._group)
            self._result = save(checkpoints, step, position, tensors, **facts, group=self._group)
        except BaseException as error:  # raised again by `finish`, in the main thread
            self._result = error


@torch.no_grad()
def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory; those of DTensors keep mesh, placements and global shape, and take this rank's shard only.

    A tensor that is there under two names is copied once.
    """
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
