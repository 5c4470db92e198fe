"""The figures of a recipe's report: epochs, decay, sizes, members, students, seeds. Drawn from its results alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.files import read_json
from trainer.outcome import RunError


def recipe_figure(source: Path, target: Path) -> None:
    """Draw all panels into one file.

    Raises:
        RunError: the results cannot be read or the file not written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = read_json(source)
    figure, panels = plt.subplots(2, 3, figsize=(16.5, 9.4), dpi=110)
    drawings: list[Callable[[Any, dict[str, Any]], None]] = [_epochs, _decay, _sizes, _members, _students, _seeds]
    for panel, draw in zip(panels.flat, drawings, strict=True):
        draw(panel, results)
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.suptitle(f"{results['recipe']}: nats per token, {results['split']} split unless said otherwise")
    figure.tight_layout()
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise RunError(
            f"the figure cannot be written: {error}", where=str(target), mend="give a file such as figures.png"
        ) from None
    finally:
        plt.close(figure)


def _of(results: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Runs of a stage of the first cell."""
    return [run for run in results["runs"].values() if run["stage"] == stage and run["cell"] == results["first"]]


def _epochs(panel: Any, results: dict[str, Any]) -> None:
    """Loss over epochs at each rate, standard; dashed: the training loss."""
    runs = _of(results, "standard")
    for number, rate in enumerate(sorted({run["lr"] for run in runs})):
        row = sorted((run for run in runs if run["lr"] == rate), key=lambda run: run["epochs"])
        x = [run["epochs"] for run in row]
        panel.plot(x, [run["loss"] for run in row], "o-", color=f"C{number}", label=f"lr {rate:g}")
        panel.plot(x, [run["train_loss"] for run in row], "--", color=f"C{number}", alpha=0.6)
    ticks = sorted({run["epochs"] for run in runs})
    if ticks:
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panel.set(title="standard recipe (dashed: training loss)", xlabel="epochs", ylabel="loss")


def _decay(panel: Any, results: dict[str, Any]) -> None:
    """Loss over weight decay, for each epochs and rate that were searched."""
    runs = [run for run in _of(results, "regularized") if run["weight_decay"]]
    rows: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for run in runs:
        rows.setdefault((run["epochs"], run["lr"]), []).append(run)
    for (epochs, rate), row in sorted(rows.items()):
        row.sort(key=lambda run: run["weight_decay"])
        panel.plot(
            [r["weight_decay"] for r in row], [r["loss"] for r in row], "o-" if len(row) > 1 else "o",
            label=f"{epochs:g} epochs, lr {rate:g}",
        )  # fmt: skip
    ticks = sorted({run["weight_decay"] for run in runs})
    if ticks:
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panel.set(title="regularized: weight decay", xlabel="weight decay", ylabel="loss")


def _sizes(panel: Any, results: dict[str, Any]) -> None:
    """The best of each size, and what ensembles of all their members reach."""
    first = results["cells"][results["first"]]
    cells = {name: cell for name, cell in results["cells"].items() if cell["tokens"] == first["tokens"]}
    for stage in ("standard", "regularized"):
        points = sorted(
            (cells[name]["parameters"], results["runs"][found["point"]["run"]]["loss"])
            for name, found in results[stage].items() if name in cells
        )  # fmt: skip
        panel.plot(*zip(*points, strict=True), "o-", label=stage) if points else None
    for kind in sorted({one["kind"] for one in results["ensembles"].values()}):
        points = sorted(
            (len(one["members"]) * cells[one["cell"]]["parameters"], one["curves"]["logit mean"][-1]["loss"])
            for one in results["ensembles"].values() if one["kind"] == kind and one["cell"] in cells
        )  # fmt: skip
        panel.plot(*zip(*points, strict=True), "s--", label=f"ensemble, {kind}") if points else None
    panel.set_xscale("log")
    panel.set(title="sizes", xlabel="parameters in all", ylabel="loss")


def _members(panel: Any, results: dict[str, Any]) -> None:
    """Curves over members, with the best and worst subset, and the limits of their laws."""
    limits = {law["recipe"]: law["c"] for law in results["laws"]["members"].get("laws", [])}
    for number, (name, one) in enumerate(results["ensembles"].items()):
        points = one["curves"]["logit mean"]
        x = [point["members"] for point in points]
        panel.plot(
            x, [point["loss"] for point in points], "o-", color=f"C{number}", label=f"{one['cell']}, {one['kind']}"
        )
        panel.fill_between(x, [p["best"] for p in points], [p["worst"] for p in points], color=f"C{number}", alpha=0.15)
        if name in limits:
            panel.axhline(limits[name], color=f"C{number}", linestyle=":", alpha=0.7)
    ticks = sorted({point["members"] for one in results["ensembles"].values() for point in one["curves"]["logit mean"]})
    panel.set_xticks(ticks or [1])
    panel.set(title="ensembles (dotted: limit of the law, no claim)", xlabel="members", ylabel="loss")


def _students(panel: Any, results: dict[str, Any]) -> None:
    """Arrows from the best single model to each student, with the ensembles as lines."""
    tuned = results["ensembles"].get(f"{results['first']}-tuned")  # the mean over seeds, where there are several
    run = results["runs"][results["regularized"][results["first"]]["point"]["run"]]
    single = run["loss"] if tuned is None else tuned["curves"]["logit mean"][0]["loss"]
    panel.axhline(single, color="C7", label="best single" + ("" if tuned is None else ", mean of seeds"))
    used = {one["teacher"] for one in results["students"].values()}
    for number, name in enumerate(sorted(used)):
        panel.axhline(
            results["ensembles"][name]["curves"]["logit mean"][-1]["loss"],
            color=f"C{number}",
            linestyle="--",
            label=f"teacher {name}",
        )
    names = sorted({one["student"] for one in results["students"].values()})
    for run, one in results["students"].items():
        loss, x = results["runs"][run]["loss"], names.index(one["student"])
        panel.annotate("", (x, loss), (x, single), arrowprops={"arrowstyle": "->", "alpha": 0.5})
        panel.plot([x], [loss], "k_", markersize=14)
        panel.text(x + 0.08, loss, f"{loss:.3f}", va="center", fontsize=8)
    panel.set_xticks(range(len(names)), names)
    panel.margins(x=0.3)
    panel.set(title="students", ylabel="loss")


def _seeds(panel: Any, results: dict[str, Any]) -> None:
    """All members one by one: the spread over seeds."""
    for number, one in enumerate(results["ensembles"].values()):
        losses = [results["runs"][run]["loss"] for run in one["members"]]
        panel.plot([number] * len(losses), losses, "o", alpha=0.7)
    names = [f"{one['cell']}\n{one['kind']}" for one in results["ensembles"].values()]
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.margins(x=0.3)
    panel.set(title="members one by one", ylabel="loss")
