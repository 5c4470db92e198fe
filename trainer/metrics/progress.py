"""One live line on a terminal, one plain line every few seconds elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table


class Progress:
    """Prints how a run goes; `shown` is False on ranks other than 0."""

    def __init__(self, shown: bool, steps: int, plain_seconds: float = 10.0) -> None:
        self.shown, self.steps, self.plain_seconds = shown, steps, plain_seconds
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.live = shown and self.console.is_terminal
        self._last = 0.0
        self._started = time.monotonic()
        self._first_step: int | None = None

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A table of names and values."""
        if self.shown:
            table = Table(title=title, show_header=False, title_justify="left")
            for row in rows:
                table.add_row(*row)
            self.console.print(table)

    def say(self, text: str) -> None:
        """A sentence on a line of its own."""
        if self.shown:
            self._clear()
            self.console.print(text, markup=False)

    def stage(self, text: str) -> None:
        """What goes on now, on a terminal only; the next line replaces it, and an empty text removes it."""
        if self.live:
            self._clear()
            sys.stdout.write(text)
            sys.stdout.flush()

    def step(self, step: int, loss: float, bits_per_byte: float, tokens_per_second: float, mfu: float | None) -> None:
        """The line of a step (counted from 1); `mfu` is None where it is unknown."""
        if not self.shown:
            return
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started = step, now
        if now - self._last < (0.2 if self.live else self.plain_seconds) and step != self.steps:
            return
        self._last = now
        done = step - self._first_step
        eta = "-" if done == 0 else _clock((now - self._started) / done * (self.steps - step))
        width = len(str(self.steps))
        line = (
            f"step {step:>{width}}/{self.steps}  loss {loss:.4f}  bits/byte {bits_per_byte:.4f}  "
            f"{tokens_per_second:,.0f} tokens/s  MFU {'unknown' if mfu is None else f'{mfu:.1%}'}  ETA {eta}"
        )
        if self.live:
            sys.stdout.write(f"\r\x1b[2K{line}")
            sys.stdout.flush()
        else:
            self.console.print(line, markup=False)

    def _clear(self) -> None:
        if self.live:
            sys.stdout.write("\r\x1b[2K")
            sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
