"""Verbs of distillation from logits: cache a teacher's targets, train a student against a teacher."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from launch.verbs.options import Cluster, On
from trainer.outcome import RunError

Form = Literal["hidden", "top-k", "sampled"]
K = Annotated[int, arg(help="Tokens of `top-k`.")]
Draws = Annotated[int, arg(help="Draws of `sampled`, at most 128.")]
DType = Annotated[Literal["bf16", "fp32"], arg(help="Precision of `hidden` states.")]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keep what a teacher says about every training token of a run.

    Forms: `hidden` (hidden states and heads of the members, from which all logits follow), `top-k` (the likeliest tokens and
    the mass of the rest), `sampled` (counts of draws, unbiased). Only data, precision, micro-batch size and resources of
    the file count. The same command goes on after an interruption; any number of ranks writes the same bytes.
    """

    OVERRIDES: ClassVar[bool] = True
    teacher: Annotated[Positional[str], arg(metavar="ENSEMBLE", help="The name of an ensemble, or of a run.")]
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the student."""
    form: Form
    """What is kept."""
    k: K = 64
    draws: Draws = 50
    seed: int = 0
    """Seed of the draws."""
    dtype: DType = "bf16"
    out: Path | None = None
    """The folder; by default caches/ENSEMBLE-FORM beside the runs."""
    offload: Literal["cpu", "disk"] | None = None
    """Where the members' weights wait until a layer needs them, by accelerate; every rank then holds whole members there."""

    def __call__(self, overrides: list[str]) -> int:
        from launch.backends import torchrun
        from trainer import config as configuration

        config = configuration.load(self.config, overrides)
        out = self.out or folder_of(config, self.teacher, self.form, self.k, self.draws)
        options = [f"--{key}={getattr(self, key)}" for key in ("form", "k", "draws", "seed", "dtype")]
        options += [f"--offload={self.offload}"] if self.offload else []
        found = torchrun.answer(
            config, "cache-targets", str(self.config), f"--teacher={self.teacher}", f"--out={out}", *options, *overrides
        )
        kept = f", {found['before']} of them there before" if found["before"] else ""
        print(
            f"{found['rows']:,} sequences, {found['tokens']:,} tokens, {found['bytes_per_token']:.1f} bytes per token in "
            f"{found['parts']} parts{kept}: {found['folder']}"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Train a student against a teacher: (1 - alpha) CE + alpha T^2 KL(teacher || student).

    The teacher, an ensemble or a run, answers live, from a cache (--cache), or from one that is made first (--form). The run goes
    through a backend as in submit; the same command goes on after an interruption. Options of the backend stand beside;
    `--section.key=value` overrides the file.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the student."""
    teacher: str
    """The name of an ensemble, or of a run, under the file's `runs`."""
    alpha: float | None = None
    """Weight of the teacher; by default the file's, or 0.9."""
    temperature: float | None = None
    """By default the file's, or 1."""
    cache: Path | None = None
    """Folder of targets that `orthogon distill cache` made."""
    form: Form | None = None
    """Make such a cache first, on this machine."""
    k: K = 64
    draws: Draws = 50
    dtype: DType = "bf16"
    on: On = None
    cluster: Cluster = None
    dry_run: bool = False
    """Print the section and the nodes, and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        from launch.choices import choose
        from launch.pipeline import Driver, drive
        from trainer import config as configuration

        if self.cache is not None and self.form is not None:
            raise RunError("--cache and --form name two caches", where="command line", mend="leave one of them out")
        on, options, rest = choose(self.on, self.cluster, overrides)
        given = {"teacher": self.teacher, "alpha": self.alpha, "temperature": self.temperature, "cache": self.cache}
        section = [f"--distill.{key}={value}" for key, value in given.items() if value is not None]
        config = configuration.load(self.config, [*rest, *section])
        first: tuple[str, ...] = ()
        if self.form is not None:
            folder = folder_of(config, self.teacher, self.form, self.k, self.draws)
            config = configuration.load(self.config, [*rest, *section, f"--distill.cache={folder}"])
            first = (
                "orthogon", "distill", "cache", self.teacher, str(self.config), f"--form={self.form}", f"--k={self.k}",
                f"--draws={self.draws}", f"--dtype={self.dtype}", f"--out={folder}", *rest,
            )  # fmt: skip
        graph = graph_of(config, first)
        if self.dry_run:
            for node in graph.nodes.values():
                what = " ".join(node.command) if node.config is None else f"run {config.folder}: {config.distill}"
                print(f"{node.name}: {what}")
            return 0
        driver = Driver(graph, on, options, say=lambda text: print(text, flush=True))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a run in the background goes on
        return drive(driver, 1)


def folder_of(config: Any, teacher: str, form: str, k: int, draws: int) -> Path:
    """Where the cache of a teacher lies, unless another folder is named."""
    size = {"top-k": str(k), "sampled": str(draws)}.get(form, "")
    return Path(config.runs) / "caches" / f"{teacher}-{form}{size}"


def graph_of(config: Any, first: tuple[str, ...]) -> Any:
    """The student's run, after the command that makes its cache, if there is one."""
    from launch.graph import Graph, Node, of_runs, settings
    from trainer.files import digest

    if not first:
        return of_runs(config.name, [config])
    made = Node(name=f"{config.name}-cache", command=first, digest=digest({"after": {}, "command": list(first)}))
    facts = {"after": {made.name: made.digest}, "config": settings(config)}
    student = Node(name=config.name, config=config, after=(made.name,), digest=digest(facts))
    return Graph(config.name, Path(config.runs), {made.name: made, student.name: student})
