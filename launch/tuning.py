"""Tune epochs, learning rate and weight decay of a run: the lattice of `launch/lattice.py`, each of whose cells is a run.

A cell's loss is the final validation loss of its whole run, never that of a run that is under way: strong decay looks bad
until the rate has fallen (arXiv 2509.14786). Cells are runs of a pipeline, found again by name and digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch import evidence, lattice, standing
from launch.graph import Node, of_runs
from launch.lattice import Found, Point
from launch.pipeline import Driver, drive, made_of
from launch.tuning_cells import Space, sequences_known, steps_per_epoch
from trainer.config_data import weights_of
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

FINISHED = Outcome.FINISHED.value
LOST = (Outcome.DIVERGED.value, Outcome.OUT_OF_DATA.value)
"""States that a cell would come to again: it has no loss, and the search goes on without it."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What to search, and how."""

    config: RunConfig
    """The run that all cells are made of; its name is the tuning's."""
    space: Space
    method: Literal["descent", "grid"] = "descent"
    start: Point | None = None
    """None: the middle epochs and rate, and the decay whose timescale is nearest to 0.3 epochs."""
    noise: float = 0.0
    """Standard deviation of a loss over seeds, in nats."""
    most_runs: int | None = None
    """Runs that are started; None: as many as it takes."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How a search ended. Cells are mappings with epochs, lr, weight_decay, tau_epochs, loss, state, run and digest."""

    tuning: str
    method: str
    certified: bool
    """The point and all its neighbours have losses, and none is better by more than twice the noise."""
    point: dict[str, Any]
    neighbours: list[dict[str, Any]]
    """At most six, each with its axis and direction; `edge` where the axis ends there."""
    missing: list[str]
    """Runs of the point and its neighbours that have no loss."""
    noise: float
    moves: list[str]
    """Runs from the start to the point."""
    cells: list[dict[str, Any]]
    """All that were asked for, in order."""
    stopped: str
    """Why the search ended early; empty if it did not."""
    code: int
    """Exit code."""
    path: str
    """Where it is kept."""


@dataclass
class _Cells:
    """The runs of a search."""

    search: Search
    backend: str
    options: Any
    at_once: int
    say: Callable[[str], None]
    nodes: dict[Point, Node] = field(default_factory=dict)
    states: dict[Point, str] = field(default_factory=dict)
    begun: int = 0
    stopped: str = ""
    code: int = 0

    def node(self, point: Point) -> Node:
        if point not in self.nodes:
            config = self.search.space.cell(self.search.config, point)
            self.nodes[point] = of_runs(self.search.config.name, [config]).nodes[config.name]
        return self.nodes[point]

    def evaluate(self, points: Sequence[Point]) -> Mapping[Point, float]:
        """Losses of cells, from runs that are there or are made now, side by side."""
        for point in points:
            check(self.node(point))
            self.states[point] = state_of(self.node(point))
        wanted = [p for p in points if self.states[p] not in (FINISHED, *LOST)]
        most = self.search.most_runs
        now = wanted if most is None else wanted[: most - self.begun]
        if now:
            self.begun += len(now)
            configs = [config for p in now if (config := self.node(p).config) is not None]
            driver = Driver(of_runs(f"tune-{self.search.config.name}", configs), self.backend, self.options, self.say)
            code = drive(driver, self.at_once)
            for point in now:
                state = state_of(self.node(point))
                why = driver.failed.get(self.node(point).name, state)
                self.states[point] = state if state in (FINISHED, *LOST) else why
            broken = [p for p in now if self.states[p] not in (FINISHED, *LOST)]
            if broken:
                self.stopped = f"{len(broken)} of {len(now)} runs failed; the same command goes on with them"
                self.code = code
        if len(now) < len(wanted) and not self.stopped:
            self.stopped = f"--most-runs = {most} runs were started, and {len(wanted) - len(now)} more are wanted; the same command goes on"
            self.code = Outcome.PREEMPTED.code
        return {point: self.loss(point) for point in points if self.states[point] in (FINISHED, *LOST)}

    def loss(self, point: Point) -> float:
        config = self.node(point).config
        assert config is not None
        return loss_of(config.folder) if self.states[point] == FINISHED else math.nan


def tune(
    search: Search, backend: str, options: Any, at_once: int = 1, say: Callable[[str], None] = lambda text: None
) -> Certificate:
    """Search, and keep the certificate in `RUNS/tunings/NAME/certificate.json`; a second call starts nothing new.

    Args:
        backend: name of the backend that runs the cells, with its `options`.
        at_once: cells that run at the same time.
        say: is told what happens, in sentences.

    Raises:
        RunError: a run of a cell's name is made of something else, or the certificate cannot be written.
    """
    cells = _Cells(search, backend, options, at_once, say)
    axes = search.space.axes(search.config)
    if search.method == "grid":
        found = lattice.grid(axes, cells.evaluate, search.noise)
    else:
        begin = search.space.start(search.config, search.start, say)
        found = lattice.descend(axes, begin, cells.evaluate, search.noise)
    certificate = certify(search, cells, found)
    path = Path(certificate.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {key: value for key, value in asdict(certificate).items() if key not in ("code", "path")})
    except OSError as error:
        raise RunError(
            f"the certificate cannot be written: {error.strerror}",
            where=str(path),
            mend="make room, or make it writable",
            outcome=Outcome.of_errno(error.errno),
        ) from None
    return certificate


def first(search: Search) -> list[tuple[Node, Point]]:
    """The cells that a search would ask for first: the whole grid, or the cross of the start."""
    cells, asked = _Cells(search, "", None, 1, lambda text: None), list[Point]()

    def ask(points: Sequence[Point]) -> Mapping[Point, float]:
        asked.extend(points)
        return {}

    axes = search.space.axes(search.config)
    if search.method == "grid":
        lattice.grid(axes, ask)
    else:
        lattice.descend(axes, search.space.start(search.config, search.start), ask)
    return [(cells.node(point), point) for point in asked]


def check(node: Node) -> None:
    """A run of a cell's name is the cell's.

    Raises:
        RunError: it is made of something else, or was resumed with other settings.
    """
    from trainer import config as configuration

    made, config = made_of(node), node.config
    assert config is not None
    if made is None:
        return
    if made == node.digest:
        present = configuration.load(config.folder / "config.yaml")
        if of_runs(node.name, [present]).nodes[present.name].digest == node.digest:
            return
        what = f"run {node.name} was resumed with other settings, and is no cell any more"
    else:
        what = f"there is a run {node.name} already, made from other inputs"
    raise RunError(what, where=str(config.folder), mend="remove it, or tune under another name with --name=...")


def state_of(node: Node) -> str:
    """The state of a cell's run; `new` where there is none."""
    assert node.config is not None
    return "new" if made_of(node) is None else standing.read(node.config.folder).state


def loss_of(folder: Path) -> float:
    """The validation loss at the last step of a finished run, in nats; NaN where there is none."""
    records = evidence.last_records(folder / "metrics.jsonl", '"validation_loss"', 1)
    value = records[0]["validation_loss"] if records else None
    if value is None or records[0]["step"] != standing.read(folder).steps:
        return math.nan
    return float(value)


def certify(search: Search, cells: _Cells, found: Found) -> Certificate:
    """What a search found, by the names of runs."""
    per_epoch = steps_per_epoch(search.config, measured(cells))
    tried = {point: row(search, cells, point, found, per_epoch) for point in cells.nodes}
    around = []
    for neighbour in found.neighbours:
        step = {"axis": neighbour.axis, "direction": "up" if neighbour.up else "down", "edge": neighbour.point is None}
        if neighbour.point is not None and neighbour.point not in tried:
            tried[neighbour.point] = row(search, cells, neighbour.point, found, per_epoch)
        around.append(step | (tried[neighbour.point] if neighbour.point is not None else {}))
    if found.point not in tried:
        tried[found.point] = row(search, cells, found.point, found, per_epoch)
    missing = [cells.node(point).name for point in found.missing]
    code = cells.code or (0 if found.certified else Outcome.DIVERGED.code)
    return Certificate(
        tuning=search.config.name, method=search.method, certified=found.certified, point=tried[found.point],
        neighbours=around, missing=missing, noise=search.noise, moves=[cells.node(point).name for point in found.moves],
        cells=list(tried.values()), stopped=cells.stopped, code=code,
        path=str(Path(search.config.runs) / "tunings" / search.config.name / "certificate.json"),
    )  # fmt: skip


def row(search: Search, cells: _Cells, point: Point, found: Found, per_epoch: float | None) -> dict[str, Any]:
    """A cell as the certificate shows it."""
    loss, node, state = found.losses.get(point, math.nan), cells.node(point), cells.states.get(point, "new")
    return {
        **search.space.values(point, per_epoch),
        "loss": loss if math.isfinite(loss) else None,
        "state": "not tried" if state == "new" else state,
        "run": node.name,
        "digest": node.digest,
    }


def measured(cells: _Cells) -> dict[str, int] | None:
    """Sequences of each source that is trained on, as a run of a cell recorded them."""
    weights = weights_of(cells.search.config.data)
    for node in cells.nodes.values():
        assert node.config is not None
        told = evidence.last_records(node.config.folder / "events.jsonl", '"event": "data"', 1)
        if told:
            return {
                name: int(one.get("subset", one["sequences"]))
                for name, one in told[0]["sources"].items()
                if weights[name]
            }
    return sequences_known(cells.search.config)
