"""The report of a recipe: one Markdown page with figures, made of its results alone; every number stands beside its run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from launch.recipes.inequalities import judge

FIGURE = "figures.png"


def page(results: dict[str, Any], inequalities: bool) -> str:
    """The whole page."""
    parts = [
        f"# Recipe {results['recipe']}\n",
        f"All losses are nats per token on the {results['split']} split"
        + (", which nothing was tuned on: searches see the validation split only." if results["split"] == "test" else
           ", on which searches chose, too: this text has no test split, so they flatter what was chosen.")
        + " Made from the runs' artefacts by `orthogon recipe run`.\n",
        "Parameters per token over 1/20, the best where compute is the limit: "
        + ", ".join(f"{of(results, name)}: {over_parametrized(c['parameters'], c['tokens']):.3g}" for name, c in results["cells"].items())
        + ".\n",
        f"![figures]({FIGURE})\n",
        "## What came out\n", main_table(results),
    ]  # fmt: skip
    if inequalities:
        parts += ["## Registered inequalities\n", judged(results)]
    parts += ["## Searches\n", searches(results), "## Ensembles\n", *curves(results), "## Laws\n", laws(results)]
    parts += ["## All runs\n", runs(results)]
    return "\n".join(parts).rstrip() + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def main_table(results: dict[str, Any]) -> str:
    """The best of every stage, the ensembles in full, the students; with tasks, their accuracies."""
    rows = []
    names = sorted({task for run in results["runs"].values() for task in run.get("tasks", {})})

    def right(found: Sequence[dict[str, Any]]) -> list[str]:
        """Accuracies on the tasks: of one with its standard error, of several their mean."""
        if len(found) == 1:
            return [f"{found[0][task]['accuracy']:.3f} ± {found[0][task]['accuracy_error']:.3f}" for task in names]
        return [f"{statistics.mean(one[task]['accuracy'] for one in found):.3f}" for task in names]

    for stage in ("standard", "regularized"):
        for cell, found in results[stage].items():
            run = results["runs"][found["point"]["run"]]
            told = [f"{stage}, {of(results, cell)}", number(run["loss"]), settings(run), run["run"]]
            rows.append([*told, *right([run.get("tasks", {})])])
    for name, one in results["ensembles"].items():
        last = one["curves"]["logit mean"][-1]
        low, high = last["interval"]
        first = one["curves"]["logit mean"][0]
        rows.append([
            f"one member, {one['kind']}, {of(results, one['cell'])}", f"{first['loss']:.4f} ({first['best']:.4f} to {first['worst']:.4f})",
            f"mean of {first['subsets']}", ", ".join(one["members"]), *right([results["runs"][run].get("tasks", {}) for run in one["members"]]),
        ])  # fmt: skip
        rows.append([
            f"{last['members']} members, {one['kind']}", f"{last['loss']:.4f} (95% of the text: {low:.4f} to {high:.4f})",
            f"lower than one by {last['gain']:.4f} ({last['gain_interval'][0]:.4f} to {last['gain_interval'][1]:.4f})", name,
            *right([{task: one["tasks"][task]["ensemble"] for task in names}]),
        ])  # fmt: skip
    for run, student in results["students"].items():
        found = results["runs"][run]
        told = [f"student {student['student']} of {student['teacher']}", number(found["loss"]), settings(found), run]
        rows.append([*told, *right([found.get("tasks", {})])])
    return table(["what", "loss", "settings", "runs", *(f"accuracy, {task}" for task in names)], rows)


def judged(results: dict[str, Any]) -> str:
    """How the inequalities came out."""
    rows = []
    for one in judge(results):
        came = "no value" if one.held is None else "held" if one.held else "**failed**"
        value = "" if one.value is None else f"{one.value:+.4f}"
        rows.append([one.number, one.claim, "hard" if one.hard else "soft", f"{one.least:+.2f}", value, came])
    told = (
        "Registered for this miniature on WikiText-2 before it was run: the hard ones are claims there, and on other text they are told like\n"
        "the soft ones. Nothing is claimed of exponents and limits (11).\n"
    )
    return "\n".join((told, table(["", "claim", "", "at least", "seen", ""], rows)))


def searches(results: dict[str, Any]) -> str:
    """The optimum of each search and whether it is certified."""
    rows = []
    for stage in ("standard", "regularized"):
        for cell, found in results[stage].items():
            point = found["point"]
            edges = [f"{n['axis']} {n['direction']}" for n in found["neighbours"] if n["edge"]]
            told = "yes" if found["certified"] else f"no{': ' if found['stopped'] else ''}{found['stopped']}"
            tau = "" if point["tau_epochs"] is None else f"{point['tau_epochs']:.3g}"
            rows.append([
                f"{stage}, {of(results, cell)}", f"{point['epochs']:g}", f"{point['lr']:g}", f"{point['weight_decay']:.4g}", tau,
                f"{point['loss']:.4f}", told, ", ".join(edges),
            ])  # fmt: skip
    head = [
        "search",
        "epochs",
        "lr",
        "weight decay",
        "tau, epochs",
        "validation loss",
        "certified",
        "ends of the lattice",
    ]
    return table(head, rows)


def curves(results: dict[str, Any]) -> list[str]:
    """Loss over the number of members, by both rules."""
    parts = []
    for name, one in results["ensembles"].items():
        rows = []
        both = zip(one["curves"]["logit mean"], one["curves"]["probability mean"], strict=True)
        for logit, probability in both:
            gain = (
                ""
                if "gain" not in logit
                else "{:.4f} ({:.4f} to {:.4f})".format(logit["gain"], *logit["gain_interval"])
            )
            rows.append([
                str(logit["members"]), str(logit["subsets"]), f"{logit['loss']:.4f}", f"{logit['best']:.4f} to {logit['worst']:.4f}",
                gain, f"{probability['loss']:.4f}",
            ])  # fmt: skip
        head = ["members", "subsets", "logit mean", "subsets' losses", "lower than one by (95%)", "probability mean"]
        parts += [f"{name} ({', '.join(one['members'])}):\n", table(head, rows)]
    return parts or ["None.\n"]


def laws(results: dict[str, Any]) -> str:
    """Fitted laws with their intervals and flags."""
    rows, notes = [], []
    for name, found in results["laws"].items():
        if "why not" in found:
            notes.append(f"No law in {name}: {found['why not']}.")
            continue
        for law in found["laws"]:
            low, high = law["intervals"]["c"] or (math.nan, math.nan)
            flags = ", ".join(law["flags"]) if law.get("flags") else ""
            at = ", ".join(f"{key} = {value:g}" for key, value in law["at"].items())
            rows.append([
                f"{law['recipe']}{', ' * bool(at)}{at}", law["axis"], f"{law['a']:.4g}", f"{law['b']:.3g}", f"{law['c']:.4f}",
                f"{low:.4f} to {high:.4f}", flags,
            ])  # fmt: skip
        for gain in found.get("efficiency") or []:
            limit = "no limit" if gain["limit_ratio"] is None else f"{gain['limit_ratio']:.2f}x by its limit"
            notes.append(
                f"{gain['recipe']}, d = {gain['d']:g}: {gain['observed_ratio']:.2f}x the data by the loss seen, {limit}."
            )
    text = table(["points", "over", "A", "B", "C (limit)", "95%", "flags"], rows) if rows else ""
    return text + "\n".join(["", *notes, ""])


def runs(results: dict[str, Any]) -> str:
    """Every run with its settings and losses."""
    rows = [
        [r["run"], r["stage"], settings(r), str(r["seed"]), str(r["steps"]), f"{r['train_loss']:.4f}", f"{r['validation_loss']:.4f}",
         f"{r['loss']:.4f}"]
        for r in results["runs"].values()
    ]  # fmt: skip
    return table(["run", "stage", "settings", "seed", "steps", "training", "validation", results["split"]], rows)


def of(results: dict[str, Any], cell: str) -> str:
    """A cell in words."""
    found = results["cells"][cell]
    return f"{found['size']} ({found['parameters'] / 1e6:.4g}M), {found['tokens']:,} tokens"


def over_parametrized(parameters: float, tokens: float) -> float:
    """Parameters per token over the 1/20 that is best where compute is the limit (Hoffmann et al., arXiv 2203.15556)."""
    return 20 * parameters / tokens


def settings(run: dict[str, Any]) -> str:
    """A run's settings in words."""
    length = f"{run['steps']} steps" if run["epochs"] is None else f"{run['epochs']:g} epochs"
    return f"{length}, lr {run['lr']:g}, weight decay {run['weight_decay']:.4g}"


def number(value: float) -> str:
    """A loss."""
    return f"{value:.4f}"
