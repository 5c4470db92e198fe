"""Which steps are skipped: not finite, or a spike of the loss or of the gradient norm by a robust z-score.

Pure arithmetic on numbers that all ranks share, so all ranks decide alike without asking. The z-score of x is
(log x - median) / max(1.4826 MAD, floor) over the last applied steps (Iglewicz and Hoaglin 1993, chapter 3): a spike does not
move the median that it is measured by, and the floors keep a run that has become very even from calling a small rise one.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from trainer.guard.options import GuardConfig

FLOORS = {"loss": 0.02, "gradient norm": 0.15}
"""Least deviation, of logarithms: noise of 2% in the loss and of 15% in the gradient norm is no news."""
CONSISTENCY = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class SpikeDetector:
    """Remembers the applied steps of a window, and judges the next one."""

    def __init__(self, options: GuardConfig) -> None:
        self.threshold, self.window = options.spike_threshold, options.spike_window
        self.seen: dict[str, deque[float]] = {name: deque(maxlen=self.window) for name in FLOORS}

    def reason(self, loss: float, gradient_norm: float) -> str:
        """Why the step must not be applied; empty if it may."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"not finite: loss {loss}, gradient norm {gradient_norm}"
        if self.threshold is None:
            return ""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            score = self.score(name, value)
            if score > self.threshold:
                middle = math.exp(median(self.seen[name]))
                return f"a spike: {name} {value:.4g} where the median is {middle:.4g}, z-score {score:.1f}"
        return ""

    def score(self, name: str, value: float) -> float:
        """The robust z-score of a value; 0 while half the window is not seen yet."""
        seen = self.seen[name]
        if len(seen) < self.window // 2:
            return 0.0
        middle = median(seen)
        deviation = CONSISTENCY * median(abs(x - middle) for x in seen)
        return (_log(value) - middle) / max(deviation, FLOORS[name])

    def accept(self, loss: float, gradient_norm: float) -> None:
        """Remember an applied step."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            self.seen[name].append(_log(value))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {name: list(values) for name, values in self.seen.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; of a longer window the newest steps stay."""
        self.seen = {name: deque(state[name], maxlen=self.window) for name in FLOORS}


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
