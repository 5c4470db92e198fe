"""The stages of a recipe, in order. Each finds what was done before, so that the same command goes on.

Standard grid and regularized search per cell, members, their curves, laws, synthetic text, students, the report. Runs go
through a backend; sampling, caches, evaluations and laws are computed on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import distilling, standing, tuning
from launch.graph import of_runs
from launch.pipeline import Driver, drive
from launch.recipes import cells as made
from launch.recipes import cost
from launch.recipes.file import Recipe, Student, size_of_students
from launch.recipes.measure import Measure
from launch.shapes import shapes
from launch.tuning import Certificate, Search, tune
from trainer.ensemble import manifest
from trainer.ensemble import recipe as texts
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

GOES_ON = (0, Outcome.DIVERGED.code, Outcome.PREEMPTED.code)
"""Codes of a search that found something: certified, not certified, or at the recipe's most runs."""


class Stopped(Exception):
    """A stage cannot be completed now; the text says why, `code` is the exit code."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code


@dataclass
class Work:
    """A recipe under way, and what it has found."""

    recipe: Recipe
    config: RunConfig
    backend: str
    options: Any
    at_once: int
    budget: float | None
    say: Callable[[str], None] = print
    standard: dict[str, Certificate] = field(default_factory=dict)
    """By cell."""
    regularized: dict[str, Certificate] = field(default_factory=dict)
    """By cell."""
    rows: dict[str, list[str]] = field(default_factory=dict)
    """By cell: the runs of the whole curve over the decay."""
    ensembles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: cell, kind, member runs."""
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By run: student, seed, teacher."""
    flops: float = 0.0
    """Of the stages that are complete."""

    @property
    def runs(self) -> Path:
        return Path(self.config.runs)

    @property
    def folder(self) -> Path:
        return self.runs / "recipes" / self.recipe.name


def work_through(work: Work) -> None:
    """All stages that make runs.

    Raises:
        Stopped: a run failed, or the budget is spent.
        RunError: a name is taken by something else, or a file cannot be written.
    """
    for cell in made.cells(work.recipe, work.config):
        if cell.of.standard:
            afford(work, "standard", cell.name)
            work.standard[cell.name] = search(work, made.standard(work.recipe, cell))
        afford(work, "regularized", cell.name)
        first, before = anchors(work, cell)
        work.regularized[cell.name] = search(work, made.regularized(work.recipe, cell, first, before))
        if work.recipe.regularized.row and cell.of.search == "full":
            if work.regularized[cell.name].certified:
                afford(work, "row", cell.name)
                work.rows[cell.name] = row(work, cell)
            else:  # another call could find another optimum, and these runs would help it
                work.say(f"the curve over the decay of {cell.name} is left out: its optimum is not certified")
    for cell in made.cells(work.recipe, work.config):
        for kind, of in work.recipe.members.items():
            if of.sizes is None or cell.size in of.sizes:
                afford(work, f"members {kind}", cell.name)
                optimum = work.regularized[cell.name].point
                names, configs = made.members(cell, kind, of, optimum, work.recipe)
                run_all(work, f"{cell.name}-{kind}", configs)
                name = f"{cell.name}-{kind}"
                manifest.write(work.runs, manifest.make(name, work.runs, names, "logit mean"))
                work.ensembles[name] = {"cell": cell.name, "kind": kind, "members": names}
    for cell in made.cells(work.recipe, work.config):
        if cell.size == size_of_students(work.recipe):
            students = []
            for name, one in work.recipe.students.items():
                afford(work, f"student {name}", cell.name)
                students += taught(work, cell, name, one)
            run_all(work, f"{cell.name}-students", students)


def afford(work: Work, stage: str, cell: str) -> None:
    """Raises:
    Stopped: this stage would pass the budget.
    """
    known = {name: certificate.point for name, certificate in work.regularized.items()}
    costs = cost.preview(work.recipe, work.config, shapes, known)
    next_one = sum(one.flops for one in costs if one.stage == stage and one.cell == cell)
    if work.budget is not None and work.flops + next_one > work.budget:
        raise Stopped(
            f"{stage} of {cell} needs {next_one:.3g} FLOPs, and {work.flops:.3g} of the budget of {work.budget:.3g} are spent; "
            "with a larger --budget the same command goes on",
            Outcome.PREEMPTED.code,
        )
    work.flops += next_one
    work.say(f"-- {stage} of {cell}")


def anchors(work: Work, cell: made.Cell) -> tuple[made.Optimum | None, made.Optimum | None]:
    """The optima of the first size and of the size before, on the same text."""
    done = [
        work.regularized[one.name].point
        for one in made.cells(work.recipe, work.config)
        if one.tokens == cell.tokens and one.name in work.regularized
    ]
    return (done[0], done[-1]) if done else (None, None)


def search(work: Work, what: Search) -> Certificate:
    """A search to its end.

    Raises:
        Stopped: runs failed, or no cell has a loss.
    """
    if (
        what.most_runs is not None
    ):  # counted over all calls of the same recipe; a run under way counts when it is found again
        there = [standing.read(folder).state for folder in work.runs.glob(f"{what.config.name}-e*-lr*")]
        ended = sum(state in (tuning.FINISHED, *tuning.LOST) for state in there)
        what = replace(what, most_runs=max(what.most_runs - ended, 0))
    certificate = tune(what, work.backend, work.options, work.at_once, work.say)
    if certificate.code not in GOES_ON or certificate.point["loss"] is None:
        raise Stopped(f"{what.config.name}: {certificate.stopped or 'no run has a loss'}", certificate.code or 1)
    told = "certified" if certificate.certified else "not certified"
    work.say(
        f"{what.config.name}: best {certificate.point['run']}, validation loss {certificate.point['loss']:.4f}, {told}"
    )
    return certificate


def row(work: Work, cell: made.Cell) -> list[str]:
    """The whole curve over the decay at an optimum; returns the runs that have a loss.

    Raises:
        Stopped: one failed in another way than by having none.
    """
    graph = of_runs(f"{cell.name}-row", made.row(work.recipe, cell, work.regularized[cell.name].point))
    wanted = [node.config for node in graph.nodes.values() if node.config and tuning.state_of(node) not in tuning.LOST]
    run_all(work, graph.name, wanted, tuning.LOST)
    return [name for name, node in graph.nodes.items() if tuning.state_of(node) == tuning.FINISHED]


def run_all(work: Work, name: str, configs: list[RunConfig], fine: Sequence[str] = ()) -> None:
    """Runs through the backend.

    Raises:
        Stopped: one failed, and did not end in a state that is `fine`.
    """
    if not configs:
        return
    driver = Driver(of_runs(name, configs), work.backend, work.options, work.say)
    code = drive(driver, work.at_once)
    codes = {outcome.value: outcome.code for outcome in Outcome}
    for run, why in driver.failed.items():
        state = tuning.state_of(driver.graph.nodes[run])
        if state not in fine:
            raise Stopped(f"{run}: {why}", codes.get(state, code))


def taught(work: Work, cell: made.Cell, name: str, one: Student) -> list[RunConfig]:
    """A student and its further seeds, ready to run: what their teacher has to make for them is there."""
    optimum = work.regularized[cell.name].point
    ensemble = f"{cell.name}-{one.teacher}"
    label = f"{cell.name.removeprefix(work.recipe.name + '-')}-{name}" if len(work.recipe.subsets) > 1 else name
    configs = [made.student(cell, label, one, optimum, work.recipe, seed) for seed in range(one.seeds)]
    if one.kind == "logits":
        configs = with_cache(work, ensemble, one, configs)
    else:
        teacher = work.ensembles[ensemble]["members"][0] if one.kind == "self" else ensemble
        configs = [with_text(work, teacher, one, config) for config in configs]
    for seed, config in enumerate(configs):
        work.students[config.name] = {"student": name, "cell": cell.name, "seed": seed, "teacher": ensemble}
    return configs


def with_text(work: Work, teacher: str, one: Student, config: RunConfig) -> RunConfig:
    """The student with its synthetic text, which is sampled if it is not there."""
    share, ensemble = distilling.share_of(one.share), texts.teacher_of(work.runs, teacher)
    distilling.check_teacher(config, ensemble, work.runs)
    alone = one.kind == "synthetic"
    needed = distilling.needed_tokens(config, ensemble, work.runs, share, alone)
    recipe = texts.recipe(
        work.runs, ensemble, "pool", tokens=one.tokens or needed, batch=128, seed=0, temperature=1.0, top_k=None, top_p=1.0
    )  # fmt: skip
    table = distilling.table_of(work.runs, recipe)
    work.say(f"synthetic text of {teacher}: {table}")
    distilling.sampled(table, recipe, work.runs, [])
    student = distilling.student_of_text(config, table, share)
    return distilling.without_real_text(student, needed) if alone else student


def with_cache(work: Work, teacher: str, one: Student, configs: list[RunConfig]) -> list[RunConfig]:
    """The students with their teacher's cached targets, which are made if they are not there."""
    from trainer import config as configuration

    raw = configuration.resolved(configs[0])
    source = work.folder / f"{configs[0].name}.yaml"
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        write_json(source, raw)  # JSON is YAML
    except OSError as error:
        raise RunError(
            f"the student's file cannot be written: {error.strerror}", where=str(source), mend="make room",
            outcome=Outcome.of_errno(error.errno),
        ) from None  # fmt: skip
    cache = work.runs / "caches" / f"{teacher}-{one.form}"
    Measure(work.runs, work.folder, work.say).command(
        "distill", "cache", teacher, str(source), f"--form={one.form}", f"--out={cache}"
    )
    section = {"teacher": teacher, "alpha": one.alpha, "cache": str(cache)}
    return [configuration.parse({**configuration.resolved(config), "distill": section}) for config in configs]
