"""A thread in each rank that shows signs of life, and ends the rank when nothing good can come of waiting any longer.

It ends the process, with stacks in the log and a `hang-rank-N.json` for `orthogon report`, when
- there was no progress (no new phase) within the patience: a rank hangs, here or elsewhere;
- a signal came and no step border was reached within `stop_timeout`;
- who launched it (torchrun's agent, Slurm's step daemon) is gone: nobody would collect this rank;
- another rank reported one of these: then every rank leaves its stacks behind.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.files import write_json
from trainer.guard.heartbeat import Heartbeat, read_all
from trainer.guard.signals import Flag
from trainer.outcome import Outcome, speak

TICK = 0.5
LINGER = 3.0
"""Seconds in which the other ranks may leave their stacks, too."""
MARK = "hang"
_HOME = Path(__file__).parents[1]
_COLLECTIVE = re.compile(r"\bwait\(|\bdist\.|all_to_all|all_reduce|all_gather|broadcast|barrier")


class Watchdog:
    """Watches one rank from a thread of its own, once it is started.

    `launched` ranks have a parent that collects them, and end with it.
    Set as the run goes on: `patience` and `stop_timeout` in seconds, and what else to do at `every_moment`.
    """

    def __init__(self, heart: Heartbeat, flag: Flag, logs: Path, rank: int, launched: bool = False) -> None:
        self.heart, self.flag, self.logs, self.rank = heart, flag, logs, rank
        self.patience = self.stop_timeout = float("inf")
        self.every_moment: Callable[[], None] = lambda: None
        self._parent = os.getppid() if launched else None
        self._told_at: float | None = None
        self._border = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        self._thread.start()
        return self

    def stop(self) -> None:
        """The rank is past everything that could hang."""
        self._end.set()

    def told(self) -> str:
        """The signal that came to this rank, or by the heartbeats of this attempt to any other; empty if none."""
        if self.flag.signal is not None:
            return self.flag.signal
        return next((beat.signal for beat in read_all(self.logs).values() if beat.signal), "")

    def border(self) -> None:
        """All ranks met at a step border: they have seen every signal that came before it."""
        self._border = time.monotonic()

    def _watch(self) -> None:
        last = time.monotonic()
        paused = 0.0
        while not self._end.wait(TICK):
            now = time.monotonic()
            if now - last > 10 * TICK:  # the process itself was stopped and goes on: that is nobody's hang
                paused = now
            last = now
            self.heart.live()
            self.every_moment()
            if self.flag.signal is not None and self._told_at is None:
                self._told_at = now
                self.heart.told(self.flag.signal)
            why = self._why(now, paused)
            if why:
                self._leave(why, now - self.heart.changed)

    def _why(self, now: float, paused: float) -> str:
        if self._parent is not None and os.getppid() != self._parent:
            return "parent is gone"
        told = self._told_at
        if told is not None and self._border < told and now - max(told, paused) > self.stop_timeout:
            return "signal not answered"
        if now - max(self.heart.changed, paused) > self.patience:
            return "no progress"
        return "another rank hangs" if (self.logs / MARK).exists() else ""

    def _leave(self, why: str, seconds: float) -> None:
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        waiting, frame = _where(main)
        text = f"rank {self.rank}: {why} for {seconds:.0f} s in phase '{self.heart.phase}' of step {self.heart.step + 1}, at {frame}"
        try:
            print(f"{text}; leaving with {Outcome.INFRASTRUCTURE.code}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            facts = {
                "rank": self.rank,
                "phase": self.heart.phase,
                "step": self.heart.step,
                "seconds": round(seconds, 1),
            }
            record = {**facts, "why": why, "waiting": waiting, "frame": frame, "time": time.time()}
            write_json(self.logs / f"hang-rank-{self.rank}.json", record)
            if why != "parent is gone":
                (self.logs / MARK).touch()
                speak(self.logs, Outcome.INFRASTRUCTURE, text, rank=self.rank, lost_peers=waiting)
                time.sleep(LINGER if why != "another rank hangs" else LINGER / 2)
        finally:
            os._exit(Outcome.INFRASTRUCTURE.code)


def _where(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and its innermost line of this program."""
    if frame is None:
        return False, "unknown"
    file = frame.f_code.co_filename
    line = linecache.getline(file, frame.f_lineno)
    waiting = f"torch{os.sep}distributed" in file or _COLLECTIVE.search(line) is not None
    inner: FrameType | None = frame
    while inner is not None and not inner.f_code.co_filename.startswith(str(_HOME)):
        inner = inner.f_back
    if inner is None:
        return waiting, f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
    path = Path(inner.f_code.co_filename).relative_to(_HOME.parent)
    return waiting, f"{path}:{inner.f_lineno} {inner.f_code.co_name}"
