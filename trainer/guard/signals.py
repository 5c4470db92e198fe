"""Signals set a flag and nothing else; the loop looks at it at the step border, and all ranks act together."""

from __future__ import annotations

import signal
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Flag:
    """Which signal came first, if any."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> Flag:
        """Take over the handled signals of this process."""
        for number in HANDLED:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
