"""The verb recipe."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from launch import process, warm
from launch.verbs.options import Cluster, On
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from launch.recipes.stages import Work


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a recipe: tuned runs, ensembles and students of one text, their laws, and a report.

    Runs go through a backend, as in submit; what they leave is measured on this machine. The same command goes on after an
    interruption and starts nothing twice. `--section.key=value` overrides the run that all runs are made of, such as
    --data.path=FILE. The report is RUNS/recipes/NAME/report.md. See docs/recipes.md.
    """

    OVERRIDES: ClassVar[bool] = True
    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """The YAML file of the recipe."""
    budget: float | None = None
    """FLOPs: stop before a stage that would pass it. By default that of the file, or none."""
    on: On = None
    cluster: Cluster = None
    at_once: int = 1
    """Runs at the same time."""
    dry_run: bool = False
    """Print what each stage costs, and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        from launch.backends import torchrun
        from launch.choices import choose
        from launch.recipes import cost, file, stages
        from launch.shapes import shapes

        if self.at_once < 1:
            raise RunError("--at-once is below one", where="command line", mend="give a number above zero")
        if self.budget is not None and not self.budget > 0:
            raise RunError("--budget is not above zero", where="command line", mend="give FLOPs, such as 5e20")
        on, options, rest = choose(self.on, self.cluster, overrides)
        recipe, config = file.read(self.recipe, rest)
        costs = cost.preview(recipe, config, shapes, {})
        print("\n".join(cost.table(costs)), flush=True)
        if self.dry_run:
            return 0
        budget = self.budget or recipe.budget
        work = stages.Work(recipe, config, on, options, self.at_once, budget, lambda text: print(text, flush=True))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs in the background go on
        with warm.kept(on == "torchrun" and torchrun.forkable(config)):
            try:
                stages.work_through(work)
            except stages.Stopped as stopped:
                print(f"stopped: {stopped}")
                return stopped.code
            return finish(work)


def finish(work: Work) -> int:
    """Results, figures and the page."""
    from launch.recipes import page, results

    found = results.collect(work)
    target = work.folder / "report.md"
    try:
        (work.folder / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        target.write_text(page.page(found, work.recipe.inequalities), encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the report cannot be written: {error.strerror}", where=str(target), mend="make room, or make it writable",
            outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip
    code = process.task("recipe-figures", str(work.folder / "results.json"), f"--figure={work.folder / page.FIGURE}")
    print(f"report: {target}")
    return code
