"""What a loss is worth: how much more data the baseline would need for it, and how much of a teacher a student keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.laws.nested import INTERVAL, Law, Limits
from trainer.laws.points import Point
from trainer.outcome import RunError


def effective_data(loss: Any, a: Any, b: Any, c: Any) -> Any:
    """The D at which the law a D^-b + c has this loss, in the law's unit of D: (a / (loss - c))^(1/b).

    Arrays or floats; infinite where the loss is not above c (arXiv 2509.14786, section 4).
    """
    above = np.asarray(loss, dtype=float) - c
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(above > 0, (np.asarray(a) / np.maximum(above, 0)) ** (1 / np.asarray(b)), np.inf)


def data_efficiency(loss: Any, baseline_loss: Any, a: Any, b: Any, c: Any) -> Any:
    """How much more data the baseline needs for `loss` than for its own `baseline_loss`, both read off its law over D.

    The baseline's loss goes through its law, too, and is not replaced by the D it was trained on: so does the paper.
    """
    return effective_data(loss, a, b, c) / effective_data(baseline_loss, a, b, c)


def retention(single: float, student: float, teacher: float) -> float:
    """The share of a teacher's gain over the best single model that its student keeps.

    `single` is the loss of the best tuned single model, not that of a member, which would flatter the student.

    Raises:
        RunError: the teacher is not better than the single model.
    """
    if not teacher < single:
        raise RunError(
            f"the teacher's loss {teacher:g} is not below the single model's {single:g}",
            where="retention", mend="without a gain there is nothing to keep",
        )  # fmt: skip
    return (single - student) / (single - teacher)


@dataclass(frozen=True)
class Efficiency:
    """A recipe at one D against the baseline there: what was seen, and beside it what was extrapolated."""

    recipe: str
    d: float
    observed: float
    """The recipe's best measured loss at D, the mean of its repeats."""
    observed_at: dict[str, float]
    observed_ratio: float
    limit: float | None
    """The limit of the recipe's nested laws at D; None where it has no axis but D."""
    limit_ratio: float | None
    limit_interval: tuple[float, float] | None
    """95%, of the noise in the limit and in the baseline's law together."""


def efficiencies(recipes: Mapping[str, Sequence[Point]], fits: Mapping[str, Limits], baseline: str) -> list[Efficiency]:
    """All recipes but the baseline, at every D that they share with it.

    Raises:
        RunError: the baseline has no law over D alone.
    """
    where = f"command line, --baseline {baseline}"
    if baseline not in fits:
        raise RunError(
            f"there is no recipe {baseline}",
            where=where,
            mend=f"recipes: {', '.join(fits) or 'name them in the column recipe'}",
        )
    stages = fits[baseline].stages
    if [stage.axis for stage in stages] != ["d"]:
        raise RunError(
            "the baseline needs one law, over d", where=where,
            mend="give its best loss at each d, with the cells of k and n empty",
        )  # fmt: skip
    law = stages[0].laws[0]
    own = {d: loss for d, (loss, _) in best_observed(recipes[baseline]).items()}
    found = []
    for recipe, points in recipes.items():
        if recipe == baseline:
            continue
        inner = {one.at["d"]: one for stage in fits[recipe].stages for one in stage.laws if list(one.at) == ["d"]}
        for d, (loss, at) in sorted(best_observed(points).items()):
            if d in own:
                found.append(_efficiency(recipe, d, loss, at, inner.get(d), law, own[d]))
    return found


def _efficiency(
    recipe: str, d: float, loss: float, at: dict[str, float], limit: Law | None, law: Law, own: float
) -> Efficiency:
    ratio = float(data_efficiency(loss, own, law.a, law.b, law.c))
    if limit is None:
        return Efficiency(recipe, d, loss, at, ratio, None, None, None)
    interval = None
    if limit.draws is not None and law.draws is not None:
        a, b, c = law.draws
        draws = data_efficiency(limit.draws[2], own, a, b, c)
        low, high = np.quantile(draws, INTERVAL, method="nearest")  # some may be infinite
        interval = float(low), float(high)
    return Efficiency(
        recipe, d, loss, at, ratio, limit.c, float(data_efficiency(limit.c, own, law.a, law.b, law.c)), interval
    )


def best_observed(points: Sequence[Point]) -> dict[float, tuple[float, dict[str, float]]]:
    """At each D the least mean loss over repeats, and where it is; nothing for points without D."""
    repeats: dict[tuple[tuple[str, float], ...], list[float]] = defaultdict(list)
    for point in points:
        repeats[tuple(point.coords.items())].append(point.loss)
    found: dict[float, tuple[float, dict[str, float]]] = {}
    for place, losses in repeats.items():
        at = dict(place)
        d, mean = at.pop("d", None), sum(losses) / len(losses)
        if d is not None and (d not in found or mean < found[d][0]):
            found[d] = mean, at
    return found
