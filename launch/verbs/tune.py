"""The verb tune."""

from __future__ import annotations

import json as json_format
import math
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from launch.verbs.options import Cluster, Json, On
from trainer.outcome import RunError

if TYPE_CHECKING:
    from launch.tuning import Certificate, Search

Values = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search epochs, rate and weight decay for the lowest validation loss; certify the optimum.

    Coordinate descent: the cross of a point is run side by side, the best neighbour is the next point, and the lattice grows
    where the optimum lies on its edge. Every cell is a whole run, NAME-e16-lr0.003-wd1.6, and counts by its final validation
    loss. The same command goes on, and starts nothing twice. Options of the backend stand beside, as in submit;
    `--section.key=value` overrides the file. See docs/tuning.md.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the runs; its `name` is the tuning's."""
    epochs: Values = (4.0, 8.0, 16.0)
    """Values of train.length, in epochs."""
    lr: Values = (1e-3, 3e-3, 1e-2)
    """Values of optim.lr; optim.adamw.lr keeps the file's ratio to it."""
    weight_decay: Values = (0.4, 0.8, 1.6, 3.2)
    """Values of optim.weight_decay."""
    tau_epochs: Values = ()
    """Values of optim.tau_epochs, to search in the timescale of decay instead of --weight-decay."""
    method: Literal["descent", "grid"] = "descent"
    """`grid` runs every cell of the given values, and does not grow."""
    start: Annotated[tuple[float, float, float] | None, arg(metavar="EPOCHS LR DECAY")] = None
    """Where descent starts; by default in the middle, with the decay whose timescale is nearest to 0.3 epochs."""
    noise: float = 0.0
    """Standard deviation of a loss over seeds, in nats: a neighbour is better only by more than twice as much."""
    most_epochs: float = 64.0
    """As far as epochs grow."""
    most_lr: float = 0.03
    """As far as the rate grows."""
    most_runs: int | None = None
    """Stop after so many runs were started; the same command goes on."""
    on: On = None
    cluster: Cluster = None
    at_once: int = 1
    """Cells that run at the same time."""
    dry_run: bool = False
    """Print the cells that would come first, and what they cost, and start nothing."""
    json: Json = False

    def __call__(self, overrides: list[str]) -> int:
        from launch import warm
        from launch.backends import torchrun
        from launch.choices import choose
        from launch.tuning import Search, tune
        from launch.tuning_cells import Space
        from trainer import config as configuration

        for name, value in (("at-once", self.at_once), ("most-runs", self.most_runs)):
            if value is not None and value < 1:
                raise RunError(f"--{name} is {value}", where="command line", mend="give a number above zero")
        if not 0 <= self.noise < math.inf:
            raise RunError(f"--noise is {self.noise}", where="command line", mend="give nats, such as 0.01, or 0")
        if self.method == "grid" and self.start is not None:
            raise RunError("a grid has no start", where="command line, --start", mend="leave it out")
        if self.tau_epochs and self.weight_decay != type(self).weight_decay:
            raise RunError(
                "--tau-epochs and --weight-decay both set the decay", where="command line", mend="leave one of them out"
            )
        on, options, rest = choose(self.on, self.cluster, overrides)
        space = Space(
            epochs=self.epochs, lr=self.lr, decay=self.tau_epochs or self.weight_decay,
            decay_key="tau_epochs" if self.tau_epochs else "weight_decay", most_epochs=self.most_epochs,
            most_lr=self.most_lr,
        )  # fmt: skip
        search = Search(
            config=configuration.load(self.config, rest), space=space, method=self.method, start=self.start,
            noise=self.noise, most_runs=self.most_runs,
        )  # fmt: skip
        if self.dry_run:
            show_first(search)
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: cells in the background go on
        file = sys.stderr if self.json else sys.stdout
        with warm.kept(on == "torchrun" and torchrun.forkable(search.config)):
            certificate = tune(search, on, options, self.at_once, lambda text: print(text, file=file, flush=True))
        if self.json:
            print(json_format.dumps(asdict(certificate)))
        else:
            show(certificate)
        return certificate.code


def show_first(search: Search) -> None:
    """Print the cells that come first and what they train on."""
    from launch.tuning import first, state_of
    from launch.tuning_cells import sequences_known, steps_per_epoch, tokens_of

    sequences = sequences_known(search.config)
    per_epoch, cells = steps_per_epoch(search.config, sequences), first(search)
    total, epochs = 0, 0.0
    for node, point in cells:
        assert node.config is not None
        tokens, state = tokens_of(node.config, sequences), state_of(node)
        values = search.space.values(point, per_epoch)
        cost = "" if tokens is None else f", {tokens:,} tokens"
        print(f"run {node.config.folder}: {words(values)}{cost}" + ("" if state == "new" else f", {state}"))
        total, epochs = total + (tokens or 0), epochs + values["epochs"]
    print(
        f"{len(cells)} runs, {epochs:g} epochs"
        + ("" if sequences is None else f", {total:,} tokens; a model of N parameters takes 6 N x {total:.3g} FLOPs")
    )


def words(values: dict[str, Any]) -> str:
    """The settings of a cell."""
    decay = "" if values["weight_decay"] is None else f", weight decay {values['weight_decay']:.4g}"
    tau = "" if values["tau_epochs"] is None else f", tau {values['tau_epochs']:.3g} epochs"
    return f"{values['epochs']:g} epochs, lr {values['lr']:g}{decay}{tau}"


def show(certificate: Certificate) -> None:
    """Print the cells and the certificate for people."""
    best = certificate.point["run"]
    width = max(len(cell["run"]) for cell in certificate.cells)
    print(f"\n   epochs       lr  weight decay  tau_epochs    loss  {'run':{width}}  state")
    for cell in certificate.cells:
        decay, tau, loss = (
            "-" if cell[key] is None else f"{cell[key]:{form}}"
            for key, form in (("weight_decay", ".4g"), ("tau_epochs", ".3g"), ("loss", ".4f"))
        )
        mark = "*" if cell["run"] == best else " "
        state = "" if cell["state"] == "finished" else cell["state"]
        print(
            f"{mark}  {cell['epochs']:6g}  {cell['lr']:7g}  {decay:>12}  {tau:>10}  {loss:>6}  {cell['run']:{width}}  {state}".rstrip()
        )
    edges = [f"{n['axis']} {n['direction']}" for n in certificate.neighbours if n["edge"]]
    print(f"\noptimum: {words(certificate.point)}" + (f"; the lattice ends at {', '.join(edges)}" if edges else ""))
    if certificate.certified:
        than = f" by more than {2 * certificate.noise:g}" if certificate.noise else ""
        print(f"certified: none of its {len(certificate.neighbours) - len(edges)} neighbours is better{than}")
    else:
        why = f"; no loss: {', '.join(certificate.missing)}" if certificate.missing else ""
        print("not certified" + (f": {certificate.stopped}" if certificate.stopped else "") + why)
    print(f"certificate: {certificate.path}")
