"""The picture of a fit: losses, laws, the band of their intervals, and the limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.laws.nested import INTERVAL, Law, Limits
from trainer.outcome import RunError

WORDS = {"k": "members, K", "n": "parameters, N", "d": "tokens, D"}
LEGEND_ROWS = 12


def laws_figure(fits: dict[str, Limits], target: Path, heading: str) -> None:
    """One panel per axis, the innermost first; a colour for each law, the dashed line its limit.

    Raises:
        RunError: the file cannot be written, or its ending is no format of matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in WORDS if any(stage.axis == axis for found in fits.values() for stage in found.stages)]
    figure, panels = plt.subplots(1, len(axes), figsize=(6.4 * len(axes), 4.8), dpi=120, squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        number = 0
        for recipe, found in fits.items():
            for stage in found.stages:
                for law in stage.laws if stage.axis == axis else []:
                    _draw(panel, recipe, law, f"C{number % 10}")
                    number += 1
        panel.set(xscale="log", xlabel=WORDS[axis], ylabel="loss, or limit of the laws inside (nats)")
        ticks = sorted({float(line) for one in panel.lines for line in one.get_xdata() if one.get_marker() == "o"})
        if len(ticks) <= 8:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
        panel.grid(alpha=0.3)
        if number <= LEGEND_ROWS:
            panel.legend(fontsize=7)
    figure.suptitle(heading)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, bbox_inches="tight")
    except (OSError, ValueError) as error:  # matplotlib refuses an unknown ending with a ValueError
        raise RunError(
            f"the figure cannot be written: {error}", where=str(target), mend="name a .png in a folder you may write to"
        ) from None
    finally:
        plt.close(figure)


def _draw(panel: Any, recipe: str, law: Law, colour: str) -> None:
    """One law, drawn to three times its largest x."""
    at = ", ".join(f"{axis} = {value:g}" for axis, value in law.at.items())
    name = ", ".join(filter(None, [recipe, at])) or "points"
    panel.plot(law.x, law.y, "o", ms=4, color=colour)
    x = np.geomspace(law.x.min(), 3 * law.x.max(), 200)
    panel.plot(
        x, law.fitted(x), lw=1.3, color=colour, label=f"{name}: {law.a:.3g} {law.axis}^-{law.b:.2f} + {law.c:.3f}"
    )
    panel.axhline(law.c, ls="--", lw=0.8, color=colour)
    if law.draws is not None:
        a, b, c = law.draws[:, :, None]
        low, high = np.quantile(a * x**-b + c, INTERVAL, axis=0)
        panel.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
