"""Verbs on ensembles: train the members, make a manifest of runs, evaluate."""

from __future__ import annotations

import json as json_format
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from launch.verbs.options import Cluster, Json, On, Runs
from trainer.ensemble import manifest
from trainer.outcome import RunError

Name = Annotated[Positional[str], arg(metavar="ENSEMBLE", help="The ensemble's name.")]
Rule = Annotated[
    Literal["logit mean", "probability mean"],
    arg(help="How the ensemble answers where one answer is asked for: multiple choice."),
]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the members of an ensemble: runs NAME-0, NAME-1, ... that differ in seeds.

    Member k has `seed` and `data.order_seed` of the file plus k, and the file's subset. The same command goes on after an
    interruption, and with more --members adds some. When all are finished their manifest is written. Options of the backend
    stand beside, as in submit; `--section.key=value` overrides the file, for all members.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the members; its `name` is the ensemble's."""
    members: int
    """How many."""
    rule: Rule = "logit mean"
    on: On = None
    cluster: Cluster = None
    at_once: int = 1
    """Members that run at the same time."""
    dry_run: bool = False
    """Print the members and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        from launch.choices import choose
        from launch.graph import of_runs
        from launch.pipeline import Driver, drive
        from trainer import config as configuration

        for name, value in (("members", self.members), ("at-once", self.at_once)):
            if value < 1:
                raise RunError(f"--{name} is {value}", where="command line", mend="give a number above zero")
        on, options, rest = choose(self.on, self.cluster, overrides)
        config = configuration.load(self.config, rest)
        members = [
            replace(
                config, name=f"{config.name}-{k}", seed=config.seed + k,
                data=replace(config.data, order_seed=config.data.order_seed + k),
            )
            for k in range(self.members)
        ]  # fmt: skip
        if self.dry_run:
            for member in members:
                print(f"run {member.folder}: seed {member.seed}, data.order_seed {member.data.order_seed}")
            return 0
        driver = Driver(of_runs(config.name, members), on, options, say=lambda text: print(text, flush=True))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: members in the background go on
        code = drive(driver, self.at_once)
        if code:
            return code
        made(config.name, Path(config.runs), [member.name for member in members], self.rule)
        return 0


@dataclass(frozen=True, kw_only=True)
class Make:
    """Make an ensemble of runs that are there, of the newest checkpoint of each.

    Members must differ in seeds or weights and agree in tokenizer, vocabulary, architecture and training text.
    """

    OVERRIDES: ClassVar[bool] = False
    name: Name
    members: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")] = ()
    """Names of the runs."""
    rule: Rule = "logit mean"
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        made(self.name, self.runs, list(self.members), self.rule)
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure an ensemble: loss over the number of members, with intervals; multiple-choice tasks.

    Single members and subsets of them are measured on the same text. The result is the same on any number of ranks (`--resources.ranks=N`). `--section.key=value` overrides what a resume may
    change, for this evaluation only.
    """

    OVERRIDES: ClassVar[bool] = True
    name: Name
    tasks: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Multiple-choice tasks, as in `orthogon evaluate`."""
    split: Literal["validation", "test"] = "validation"
    """The text that losses are measured on."""
    most: int = 31
    """Most subsets of members; where there are more, the nested chain and a sample of each size are taken."""
    seed: int = 0
    """Seed of that sample and of the bootstrap."""
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch import process
        from launch.backends import torchrun

        first = manifest.read(self.runs, self.name).members[0].run
        _, config = process.opened(first, self.runs, overrides)
        for task in self.tasks:
            if not task.is_file():
                raise RunError(f"there is no task {task}", where="command line, --tasks", mend="check the path")
        tasks = ["--tasks", *map(str, self.tasks)] if self.tasks else []
        folder = manifest.folder_of(self.runs, self.name)
        found = torchrun.answer(
            config, "evaluate-ensemble", str(folder), *overrides, *tasks, f"--split={self.split}", f"--most={self.most}",
            f"--seed={self.seed}",
        )  # fmt: skip
        if self.json:
            print(json_format.dumps(found))
        else:
            show(found)
        return 0


def made(name: str, runs: Path, members: list[str], rule: str) -> None:
    """Write the manifest of an ensemble, and say what it holds.

    Raises:
        RunError: as `manifest.make` and `manifest.write`.
    """
    ensemble = manifest.make(name, runs, members, rule)
    path = manifest.write(runs, ensemble)
    for member in ensemble.members:
        print(f"{member.run}  step {member.step}, seed {member.seed}, data.order_seed {member.order_seed}")
    print(f"ensemble {name}, {rule} of {len(ensemble.members)}: {path}")


def show(found: dict[str, Any]) -> None:
    """Print an evaluation for people."""
    text, subsets = found["text"], found["subsets"]
    print(
        f"ensemble {found['ensemble']} of {len(found['members'])}, {found['split']} text: {text['sequences']:,} sequences, "
        f"{text['tokens']:,} tokens; {subsets['evaluated']} of {subsets['of']} subsets"
    )
    for member in found["members"]:
        print(f"  {member['run']}, step {member['step']}: loss {member['loss']:.4f}")
    for rule, points in found["curves"].items():
        print(
            f"\n{rule}\nmembers  subsets  loss    95% interval      best    worst   bits/byte  lower than one member by"
        )
        for point in points:
            gain = f"{point['gain']:.4f} {bounds(point['gain_interval'])}" if "gain" in point else ""
            print(
                f"{point['members']:7}  {point['subsets']:7}  {point['loss']:.4f}  {bounds(point['interval'])}  "
                f"{point['best']:.4f}  {point['worst']:.4f}  {point['bits_per_byte']:9.4f}  {gain}".rstrip()
            )
    for name, task in found.get("tasks", {}).items():
        whole, single = task["ensemble"], [member["accuracy"] for member in task["members"]]
        print(
            f"\ntask {name}, {whole['questions']:,} questions: accuracy {whole['accuracy']:.4f} ± {whole['accuracy_error']:.4f}, "
            f"per byte {whole['accuracy_per_byte']:.4f}, by {found['rule']}; single members {min(single):.4f} to {max(single):.4f}"
        )


def bounds(interval: list[float]) -> str:
    """An interval as text."""
    return f"{interval[0]:.4f}..{interval[1]:.4f}"
