"""The inequalities that were registered for the miniature protocol before it was run, judged on its results.

Hard ones are claims; soft ones are reported. No claim is made on exponents, asymptotes or the paper's factor of data (11).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

TUNED, HALF, PAPER = "tuned", "half", "paper"
"""Kinds of members that the inequalities are about: at the optimum, half its decay, twice the epochs and half the decay."""


@dataclass(frozen=True)
class Judged:
    """One inequality and how it came out."""

    number: str
    claim: str
    hard: bool
    value: float | None
    """None: what it needs was not run."""
    least: float
    """The value that was asked for."""

    @property
    def held(self) -> bool | None:
        return None if self.value is None else self.value >= self.least


@dataclass(frozen=True)
class Facts:
    """Losses of the first cell, by what they are about."""

    results: dict[str, Any]

    @property
    def first(self) -> str:
        return str(self.results["first"])

    def runs(self, stage: str) -> list[dict[str, Any]]:
        return [r for r in self.results["runs"].values() if r["stage"] == stage and r["cell"] == self.first]

    def best(self, stage: str) -> dict[str, Any]:
        run: dict[str, Any] = self.results["runs"][self.results[stage][self.first]["point"]["run"]]
        return run

    def curve(self, kind: str) -> dict[int, float]:
        """Mean losses of the logit mean over subsets, by their size."""
        points = self.results["ensembles"][f"{self.first}-{kind}"]["curves"]["logit mean"]
        return {point["members"]: point["loss"] for point in points}

    def single(self) -> float:
        """The best tuned single model: the mean over its seeds."""
        return self.curve(TUNED)[1]

    def students(self, name: str) -> float:
        """The mean loss of a student over its seeds."""
        runs = [run for run, one in self.results["students"].items() if one["student"] == name]
        return float(statistics.mean(self.results["runs"][run]["loss"] for run in runs))

    def retained(self, name: str, kind: str) -> float:
        """Share of an ensemble's gain over the best single model that a student keeps."""
        curve = self.curve(kind)
        return (self.single() - self.students(name)) / (self.single() - curve[max(curve)])


def judge(results: dict[str, Any]) -> list[Judged]:
    """All of them, in order; those whose runs are missing have no value."""
    facts = Facts(results)
    size = results["cells"][facts.first]["parameters"]

    def others(least: float) -> list[float]:
        """Losses of tuned single models with so many times the parameters, or more."""
        cells = [name for name, cell in results["cells"].items() if cell["parameters"] >= least * size * 0.95]
        return [results["runs"][results["regularized"][name]["point"]["run"]]["loss"] for name in cells]

    def over_epochs() -> float:
        best = facts.best("standard")
        same = [run for run in facts.runs("standard") if run["lr"] == best["lr"]]
        longest = max(same, key=lambda run: run["epochs"])
        return float(min(longest["loss"] - best["loss"], best["train_loss"] - longest["train_loss"]))

    def inside() -> float:
        best = facts.best("regularized")
        row = [r for r in facts.runs("regularized") if (r["epochs"], r["lr"]) == (best["epochs"], best["lr"])]
        ends = {run["weight_decay"]: run["loss"] for run in row}
        lattice = {*results["decays"], *ends}  # a search may have gone beyond what the recipe names
        return float(min(ends[min(lattice)], ends[max(lattice)]) - best["loss"])

    def falling(kind: str) -> float:
        losses = [loss for _, loss in sorted(facts.curve(kind).items())]
        return min(before - after for before, after in pairwise(losses))

    def growing() -> float:
        cells = sorted(results["cells"].items(), key=lambda item: item[1]["parameters"])
        losses = [results["runs"][results["regularized"][name]["point"]["run"]]["loss"] for name, _ in cells]
        return float(min(before - after for before, after in pairwise(losses)))

    def most() -> int:
        return max(facts.curve(TUNED))

    claims: list[tuple[str, str, bool, float, Callable[[], float]]] = [
        ("1", "regularized is below the best standard run", True, 0.10, lambda: facts.best("standard")["loss"] - facts.single()),
        ("2", "standard: more epochs raise the loss and lower the training loss (the smaller change)", True, 0.10, over_epochs),
        ("3", "weight decay has an optimum inside, both ends of the lattice worse", True, 0.05, inside),
        ("4a", "two tuned members are below the mean of one", True, 0.05, lambda: facts.curve(TUNED)[1] - facts.curve(TUNED)[2]),
        ("4b", "two members of half decay are below the mean of one", True, 0.10, lambda: facts.curve(HALF)[1] - facts.curve(HALF)[2]),
        ("4c", "the loss falls with every member", True, 0.0, lambda: min(falling(TUNED), falling(HALF))),
        ("5", "an ensemble is below the best single model of as many parameters", True, 0.0,
         lambda: min(others(most())) - min(facts.curve(TUNED)[most()], facts.curve(HALF)[most()])),
        ("5'", "three members are below the best single model of any size", True, 0.0,
         lambda: min(others(0)) - min(facts.curve(TUNED)[3], facts.curve(HALF)[3])),
        ("5b", "half decay: worse alone, better together", True, 0.0,
         lambda: min(facts.curve(HALF)[1] - facts.curve(TUNED)[1], facts.curve(TUNED)[most()] - facts.curve(HALF)[most()])),
        ("6a", "the logit student keeps this share of the ensemble's gain", True, 0.50, lambda: facts.retained("logits", HALF)),
        ("6b", "the student of pooled text keeps this share", True, 0.25, lambda: facts.retained("text", HALF)),
        ("7a", "both students are below the best single model", True, 0.0,
         lambda: facts.single() - max(facts.students("logits"), facts.students("text"))),
        ("7b", "self-distillation is below its teacher", True, 0.0, lambda: teacher(facts) - facts.students("self")),
        ("7c", "self-distillation is below the best single model", False, 0.0, lambda: facts.single() - facts.students("self")),
        ("8", "synthetic text alone is worse than mixed", False, 0.20, lambda: facts.students("synthetic") - facts.students("text")),
        ("9", "regularized loss falls with parameters", False, 0.0, growing),
        ("10", "twice the epochs and half the decay: together below tuned members", False, 0.0,
         lambda: facts.curve(TUNED)[max(facts.curve(PAPER))] - facts.curve(PAPER)[max(facts.curve(PAPER))]),
    ]  # fmt: skip
    judged = []
    for number, claim, hard, least, value in claims:
        try:
            judged.append(Judged(number, claim, hard, value(), least))
        except (
            KeyError,
            ValueError,
            StopIteration,
            ZeroDivisionError,
            statistics.StatisticsError,
        ):  # what it is about was not run
            judged.append(Judged(number, claim, hard, None, least))
    return judged


def teacher(facts: Facts) -> float:
    """The loss of the member that the student `self` learned from."""
    run = next(one for one in facts.results["students"].values() if one["student"] == "self")
    loss: float = facts.results["runs"][facts.results["ensembles"][run["teacher"]]["members"][0]]["loss"]
    return loss
