"""The space that a tuning searches: its axes, where it starts, and the run that belongs to a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.evidence import record
from launch.lattice import Axis, Point
from trainer.config_data import sources_of, weights_of
from trainer.data.mixture import Passes
from trainer.derive import derive
from trainer.optim.decay import tau_epochs
from trainer.outcome import RunError
from trainer.units import split_length

if TYPE_CHECKING:
    from trainer.config import RunConfig

TAU_EPOCHS = 0.3
"""Timescale of decay at which a search starts: the tuned optima of arXiv 2509.14786, 4 sizes by 4 amounts of text, lie
between 0.20 and 0.52 epochs. A prior, not a law."""
LEAST = {"lr": 1e-6, "weight_decay": 1e-4, "tau_epochs": 1e-2}
MOST_TAU = 1e3


@dataclass(frozen=True, kw_only=True)
class Space:
    """Values of epochs, of the rate, and of the decay, by weight or by time."""

    epochs: tuple[float, ...]
    lr: tuple[float, ...]
    decay: tuple[float, ...]
    decay_key: Literal["weight_decay", "tau_epochs"] = "weight_decay"
    most_epochs: float = 64.0
    """As far as epochs grow."""
    most_lr: float = 0.03
    """As far as the rate grows."""

    def axes(self, config: RunConfig) -> tuple[Axis, Axis, Axis]:
        """The axes in order, checked.

        Raises:
            RunError: values that are none, or a configuration that cannot take them.
        """
        limit = config.data.max_epochs
        epochs = _ascending("epochs", self.epochs, least=1.0)
        rates = _ascending("lr", self.lr)
        decays = _ascending(self.decay_key, self.decay, zero=self.decay_key == "weight_decay")
        if limit is not None and epochs[-1] > limit:
            raise RunError(
                f"--epochs {epochs[-1]:g} is above data.max_epochs = {limit}", where="command line, --epochs",
                mend="leave data.max_epochs out",
            )  # fmt: skip
        if config.optim.lr == 0:
            raise RunError(
                "optim.lr is 0, which other rates can keep no ratio to", where="optim.lr", mend="give any rate above 0"
            )
        length_of(config, epochs[0])
        most_decay = 1 / max(rates[-1], self.most_lr) if self.decay_key == "weight_decay" else MOST_TAU
        return (
            Axis("epochs", epochs, 1.0, min(self.most_epochs, limit or math.inf)),
            Axis("lr", rates, LEAST["lr"], self.most_lr),
            Axis(self.decay_key, decays, LEAST[self.decay_key], most_decay),
        )

    def start(self, config: RunConfig, given: Point | None, say: Callable[[str], None] = lambda text: None) -> Point:
        """Where the search starts: as given, or the middle epochs and rate with the decay nearest to TAU_EPOCHS.

        Raises:
            RunError: the given point is not of the lattice.
        """
        axes = self.axes(config)
        if given is not None:
            for axis, value in zip(axes, given, strict=True):
                if value not in axis.values:
                    raise RunError(
                        f"--start: {axis.name} {value:g} is no value of the lattice",
                        where="command line, --start",
                        mend=f"use one of {', '.join(f'{v:g}' for v in axis.values)}",
                    )
            return given
        epochs, rate = _middle(axes[0].values), _middle(axes[1].values)
        per_epoch = steps_per_epoch(config, sequences_known(config))
        taus = {}
        for value in axes[2].values:
            known = per_epoch is not None or self.decay_key == "tau_epochs"
            tau = self.values((epochs, rate, value), per_epoch)["tau_epochs"] if known else None
            if tau is not None:
                taus[value] = abs(math.log(tau / TAU_EPOCHS))
        if not taus:
            say(
                "the search starts in the middle of the lattice: the steps of an epoch are known before the data is prepared "
                "only with data.subset_tokens or data.table"
            )
            return epochs, rate, _middle(axes[2].values)
        return epochs, rate, min(taus, key=taus.__getitem__)

    def cell(self, config: RunConfig, point: Point) -> RunConfig:
        """The run of a point: its length, rates and decay, and a name that tells them."""
        epochs, lr, decay = point
        short = {"weight_decay": "wd", "tau_epochs": "tau"}[self.decay_key]
        name = f"{config.name}-e{epochs:g}-lr{lr:g}-{short}{decay:g}"
        if len(name) > 100:
            raise RunError(
                f"'{name}' is too long for the name of a run", where="name", mend="tune under a shorter --name=..."
            )
        optim: Any = self._decayed(replace(config.optim, lr=lr), decay)
        if hasattr(optim, "adamw"):
            other = replace(optim.adamw, lr=float(f"{optim.adamw.lr * lr / config.optim.lr:.12g}"))
            optim = replace(optim, adamw=self._decayed(other, decay) if other.decay_head else other)
        train = replace(config.train, length=length_of(config, epochs))
        return replace(config, name=name, optim=optim, train=train)

    def _decayed(self, options: Any, decay: float) -> Any:
        unset = {"weight_decay": type(options)().weight_decay, "tau_epochs": None}
        return replace(options, **(unset | {self.decay_key: decay}))

    def values(self, point: Point, per_epoch: float | None) -> dict[str, Any]:
        """A point by name: with the decay and its timescale, each None where it does not follow."""
        epochs, lr, decay = point
        if self.decay_key == "weight_decay":
            tau = None if per_epoch is None else tau_epochs(lr, decay, per_epoch)
            return {"epochs": epochs, "lr": lr, "weight_decay": decay, "tau_epochs": tau}
        weight_decay = None if per_epoch is None else 1 / (lr * decay * per_epoch)
        return {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "tau_epochs": decay}


def length_of(config: RunConfig, epochs: float) -> str:
    """`train.length` of so many epochs, of the source that the configuration counts by.

    Raises:
        RunError: a mixture whose configuration counts by none.
    """
    unit = split_length(config.train.length)[1]
    if unit.startswith("epochs"):
        return f"{epochs:g} {unit}"
    if config.data.mixture:
        raise RunError(
            f"train.length is '{config.train.length}', and the sources of a mixture end at different steps",
            where="train.length",
            mend=f"say which source epochs are counted of, such as '1 epochs of {next(iter(config.data.mixture))}'",
        )
    return f"{epochs:g} epochs"


def sequences_known(config: RunConfig) -> dict[str, int] | None:
    """Sequences of each source where they are known before any data is prepared: from subsets and given tables."""
    found = {}
    for name, source in sources_of(config.data).items():
        if not weights_of(config.data)[name]:
            continue  # only validated on
        if source.subset_tokens is not None:
            found[name] = source.subset_tokens // config.data.sequence_length
        elif source.table is not None and (facts := record(Path(source.table) / "table.json")) is not None:
            found[name] = int(facts["splits"]["train"]["sequences"])
        else:
            return None
    return found


def steps_per_epoch(config: RunConfig, sequences: dict[str, int] | None) -> float | None:
    """Optimizer steps of one pass over all sources, as the trainer counts them."""
    per_step = config.train.tokens_per_step // config.data.sequence_length
    return None if sequences is None else sum(sequences.values()) / per_step


def tokens_of(config: RunConfig, sequences: dict[str, int] | None) -> int | None:
    """Tokens that a run trains on, repetitions counted; None where the data is not known."""
    if sequences is None:
        return None
    return derive(config, 1, Passes(weights_of(config.data), sequences)).sequences * config.data.sequence_length


def _ascending(name: str, values: Sequence[float], *, least: float = 0.0, zero: bool = False) -> tuple[float, ...]:
    option = f"--{name.replace('_', '-')}"
    if not values:
        raise RunError(f"{option} has no values", where=f"command line, {option}", mend="give one or more numbers")
    for value in values:
        if not math.isfinite(value) or value < least or (value == 0 and not zero):
            bound = f"{least:g} or more" if least or zero else "above zero"
            raise RunError(
                f"{option} {value:g} is not {bound}", where=f"command line, {option}", mend="correct the value"
            )
    if len({f"{value:g}" for value in values}) < len(values):
        raise RunError(f"{option} names a value twice", where=f"command line, {option}", mend="leave one out")
    return tuple(sorted(values))


def _middle(values: Sequence[float]) -> float:
    """The middle value, of two the lower."""
    return values[(len(values) - 1) // 2]
