"""Synthetic text: sample a table of it from a teacher; train a student on a mixture with it."""

from __future__ import annotations

import json as json_format
import signal
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from launch.verbs.options import Cluster, Json, On, Runs
from trainer.outcome import RunError

if TYPE_CHECKING:
    from trainer.ensemble.recipe import Recipe

Mode = Annotated[
    str,
    arg(
        metavar="pool|joint|RUN",
        help="Who samples: every member its share of the batches, the ensemble by its rule, or the one member that is named.",
    ),
]
Seed = Annotated[int, arg(help="Seed of the choices.")]
Temperature = Annotated[float, arg(help="Spread of the choices; 1 samples what the teacher believes.")]
TopK = Annotated[int | None, arg(help="Choose among the k likeliest tokens only.")]
TopP = Annotated[float, arg(help="Choose among the likeliest tokens that hold this share of the probability.")]
Batch = Annotated[
    int, arg(help="Sequences that are decoded at once; another number gives other last bits, so other text.")
]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample synthetic text from an ensemble, or from a run, into a token table.

    Nothing is prompted: sequences begin as documents do, and go on with the next document where one ends. The table is the same
    on any number of ranks (`--resources.ranks=N`); the same command goes on after an interruption, and does nothing when the
    table is finished. `--section.key=value` overrides what a resume may change, for this sampling only.
    """

    OVERRIDES: ClassVar[bool] = True
    name: Annotated[Positional[str], arg(metavar="TEACHER", help="An ensemble, or a run.")]
    tokens: str
    """How many tokens, such as `1M`; rounded up to whole sequences."""
    out: Path | None = None
    """The table's folder; by default one in RUNS/synthetic that is named after the teacher."""
    mode: Mode = "pool"
    seed: Seed = 0
    temperature: Temperature = 1.0
    top_k: TopK = None
    top_p: TopP = 1.0
    batch: Batch = 128
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.distilling import sampled, table_of
        from trainer.ensemble import recipe

        made = recipe.recipe(
            self.runs, recipe.teacher_of(self.runs, self.name), self.mode, tokens=count(self.tokens), batch=self.batch,
            seed=self.seed, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
        )  # fmt: skip
        folder = self.out or table_of(self.runs, made)
        found = sampled(folder, made, self.runs, overrides)
        if self.json:
            print(json_format.dumps(found or recipe.statistics(folder)))
        else:
            show(folder, made, found)
        return 0


@dataclass(frozen=True, kw_only=True)
class Text:
    """Train a student on real text and on synthetic text of a teacher (sequence-level distillation).

    CONFIG is a run on the teacher's text. The synthetic share comes on top: steps become base / (1 - share), so that real text
    is passed as often as CONFIG says. The synthetic table is sampled first where it is not there, on this machine. The student is
    validated on real text only. The same command goes on after an interruption. A teacher that is a single run gives
    self-distillation. Options of the backend stand beside, as in submit; `--section.key=value` overrides the file.
    """

    OVERRIDES: ClassVar[bool] = True
    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the student; its `name` is the student's."""
    teacher: str
    """An ensemble, or a run."""
    share: str
    """Synthetic share of the stream, above 0 and below 1, such as `0.75` or `9/10`."""
    alone: bool = False
    """Train on the synthetic text alone, in as many steps as the mixture would take: a control. Real text is validated on."""
    tokens: str | None = None
    """Tokens of the synthetic pool; by default as many as the student draws, so that none is repeated."""
    mode: Mode = "pool"
    sample_seed: Seed = 0
    temperature: Temperature = 1.0
    top_k: TopK = None
    top_p: TopP = 1.0
    batch: Batch = 128
    sample_ranks: Annotated[
        int | None,
        arg(help="Processes that sample on this machine; none takes as many as the members were trained on."),
    ] = None
    on: On = None
    cluster: Cluster = None
    dry_run: bool = False
    """Print the table and the student's data, and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        from launch import distilling
        from launch.choices import choose
        from launch.graph import of_runs
        from launch.pipeline import Driver, drive
        from trainer import config as configuration
        from trainer.ensemble import recipe

        share = distilling.share_of(self.share)
        on, options, rest = choose(self.on, self.cluster, overrides)
        config = configuration.load(self.config, rest)
        runs = Path(config.runs)
        teacher = recipe.teacher_of(runs, self.teacher)
        distilling.check_teacher(config, teacher, runs)
        needed = distilling.needed_tokens(config, teacher, runs, share, self.alone)
        made = recipe.recipe(
            runs, teacher, self.mode, tokens=needed if self.tokens is None else count(self.tokens), batch=self.batch,
            seed=self.sample_seed, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
        )  # fmt: skip
        table = distilling.table_of(runs, made)
        student = distilling.student_of_text(config, table, share)
        if self.alone:
            student, share = distilling.without_real_text(student, needed), Fraction(1)
        print(
            f"student {student.name}: {student.train.length}, synthetic share {share}; synthetic pool of {made.tokens:,} tokens, "
            f"{needed:,} drawn; synthetic pool passes: {needed / made.tokens:.2f}"
            + (" (it is repeated)" if needed > made.tokens else "")
        )
        if self.dry_run:
            print(
                f"table {table}: {'there' if recipe.finished(table, made) else 'to be sampled'}\nrun {student.folder}:"
            )
            data = configuration.resolved(student)["data"]
            print(json_format.dumps({key: data[key] for key in ("mixture", "tokenizer")}, indent=1))
            return 0
        ranks = [] if self.sample_ranks is None else [f"--resources.ranks={self.sample_ranks}"]
        show(table, made, distilling.sampled(table, made, runs, ranks))
        driver = Driver(of_runs(student.name, [student]), on, options, say=lambda text: print(text, flush=True))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a student in the background goes on
        return drive(driver, 1)


def count(text: str) -> int:
    """A number of tokens such as `1M`.

    Raises:
        RunError: it is none.
    """
    from trainer.units import parse_count

    try:
        return int(parse_count(text))
    except ValueError as error:
        raise RunError(str(error), where="command line, --tokens", mend="write 4096, 350M or 1B") from None


def show(folder: Path, made: Recipe, found: dict[str, Any] | None) -> None:
    """Print what was sampled, for people."""
    from trainer.ensemble.recipe import statistics

    if found is None:
        print(f"table {folder} is there already, with these settings")
        found = statistics(folder)
    else:
        print(f"table {folder}")
    who = ", ".join(member.run for member in made.members)
    long = found["document_tokens"]
    print(f"  {made.mode} of {who}: {found['sequences']:,} sequences, {found['tokens']:,} tokens, seed {made.seed}")
    print(
        f"  teacher's loss on it {found['teacher_loss']:.4f} ± {found['teacher_loss_error']:.4f}, its entropy "
        f"{found['teacher_entropy']:.4f} nats per token"
    )
    print(
        f"  {found['documents']:,} whole documents, {found['documents_cut']:,} cut"
        + (f"; tokens: median {long['median']:g}, {long['p10']:g} to {long['p90']:g}" if long else "")
    )
    held = ", ".join(f"{value:.2%} of {name}" for name, value in found["copied_13_of_validation"].items())
    print(
        f"  distinct 1-, 2-, 3-grams {found['distinct_1']:.4f}, {found['distinct_2']:.4f}, {found['distinct_3']:.4f}; windows of 13 "
        f"tokens that occur in the training text: {found['copied_13']:.2%} (of validation text: {held})"
    )
