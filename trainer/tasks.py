"""The tasks of `python -m trainer` beside training: what needs torch and is asked for by a verb of `orthogon`.

One registry: `TASKS` names each task's options and its function. torch is imported by the function that needs it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.files import write_json
from trainer.outcome import RunError


@dataclass(frozen=True)
class Task:
    """A task: its line in the help, its options beside the target, and its work."""

    help: str
    work: Callable[[Namespace, list[str]], None]
    options: Callable[[ArgumentParser], None] = lambda parser: None
    overrides: bool = False
    """Whether it takes `--section.key=value`."""


def prepare(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import data

    config = configuration.load(arguments.target, overrides)
    folders = data.prepare(config.data, lambda line: print(line, flush=True))
    opened = data.open_data(folders, config.data)
    for name, line in data.summary(opened):
        print(f"{name}: {folders[name]}\n  {line}")
    print(f"tokenizer: {opened.tokenizer['vocab_size']:,} tokens, digest {opened.tokenizer['tokenizer_digest'][:12]}")


def verify_table(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import data

    data.verify(arguments.target)
    print(f"{arguments.target}: good")


def export(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.checkpoint import export as exports
    from trainer.checkpoint import manifest as manifests

    folder, manifest = manifests.pick(arguments.target, arguments.step)
    goal = arguments.to or arguments.target / "export" / folder.name
    difference = exports.export(arguments.target, folder, manifest, goal)
    print(f"exported {folder.name} to {goal}; largest difference of logits: {difference:g}")


def average(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.checkpoint.average import average_checkpoints

    average_checkpoints(arguments.target, arguments.steps, arguments.decay, arguments.to, print)


def evaluate(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import distributed, runfolder
    from trainer.evaluate.task import evaluate as evaluated

    config = runfolder.open_run(arguments.target, overrides)
    answer = evaluated(arguments.target, config, arguments.step, arguments.export, arguments.tasks, arguments.split)
    if distributed.rank() == 0:
        write_json(arguments.answer / "answer.json", answer)
    distributed.stop()


def evaluate_ensemble(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import distributed, runfolder
    from trainer.ensemble import manifest
    from trainer.ensemble.task import evaluate as evaluated

    name, runs = arguments.target.name, arguments.target.parents[1]
    first = manifest.read(runs, name).members[0].run
    config = runfolder.open_run(runs / first, overrides)
    answer = evaluated(
        name, runs, config, arguments.tasks, split=arguments.split, most=arguments.most, seed=arguments.seed
    )
    if distributed.rank() == 0:
        write_json(arguments.answer / "answer.json", answer)
    distributed.stop()


def sample(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import distributed
    from trainer.ensemble.sample import sample as sampled

    answer = sampled(arguments.target, arguments.runs, overrides)
    if distributed.rank() == 0:
        write_json(arguments.answer / "answer.json", answer)
    distributed.stop()


def cache_targets(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import distributed
    from trainer.ensemble import forms
    from trainer.ensemble.cache_task import make

    config = configuration.load(arguments.target, overrides)
    chosen = {
        "hidden": {"dtype": arguments.dtype}, "top-k": {"k": arguments.k},
        "sampled": {"draws": arguments.draws, "seed": arguments.seed},
    }  # fmt: skip
    form = forms.of_json({"name": arguments.form, **chosen[arguments.form]})
    answer = make(arguments.teacher, config, form, arguments.out, offload=arguments.offload)
    if distributed.rank() == 0:
        write_json(arguments.answer / "answer.json", answer)
    distributed.stop()


def harness(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.evaluate.harness import harness as harnessed

    answer = harnessed(
        arguments.target, arguments.step, arguments.export, arguments.tasks, arguments.include, arguments.limit
    )
    write_json(arguments.answer / "answer.json", answer)


def generate(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.checkpoint.export import loaded_model
    from trainer.evaluate.text import load_tokenizer

    tokenizer = load_tokenizer(arguments.target)
    _continue(arguments, tokenizer, *loaded_model(arguments.target, arguments.step, arguments.export))


def generate_ensemble(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.ensemble import manifest
    from trainer.ensemble.joint import loaded
    from trainer.evaluate.text import load_tokenizer

    runs = arguments.target.parents[1]
    ensemble = manifest.read(runs, arguments.target.name)
    tokenizer = load_tokenizer(runs / ensemble.members[0].run)
    _continue(arguments, tokenizer, *loaded(runs, ensemble))


def _continue(arguments: Namespace, tokenizer: Any, model: Any, room: int, device: Any) -> None:
    """Print the continuations of the prompts as they are made."""
    from trainer.evaluate.sampling import Sampling
    from trainer.evaluate.text import generate as pieces

    prompts = [*arguments.prompt, *_lines(arguments.prompts)]
    sampling = Sampling(
        tokens=arguments.tokens, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        seed=arguments.seed,
    )  # fmt: skip
    shown = None
    for index, piece, text in pieces(
        model, tokenizer, prompts, sampling, room=room, device=device, batch=arguments.batch
    ):
        if arguments.json:
            if text is not None:
                print(json.dumps(vars(text), ensure_ascii=False), flush=True)
        elif arguments.batch == 1:
            if shown != index:
                print(("" if shown is None else "\n") + prompts[index], end="", flush=True)
                shown = index
            print(piece, end="" if text is None else "\n", flush=True)
        elif text is not None:
            print(("" if index == 0 else "\n") + text.prompt + text.continuation, flush=True)
        if text is not None and text.cut:
            print(f"[the first {text.cut} tokens of the prompt were left out: the model takes {room}]", file=sys.stderr)
        if text is not None and text.ended == "context":
            print(f"[stopped after {text.tokens} tokens: the model takes {room} in all]", file=sys.stderr)


def _lines(path: Path | None) -> list[str]:
    """The lines of a file of prompts that are not empty."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line] if path is not None else []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the prompts cannot be read: {error}", where=str(path), mend="check the file") from None


def shapes(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.model.footprint import footprint

    write_json(arguments.answer / "answer.json", footprint(configuration.load(arguments.target)))


def probe(arguments: Namespace, overrides: list[str]) -> None:
    from trainer import distributed
    from trainer import probe as probes

    kind, _, device = str(arguments.target).rpartition("-")
    if not kind:
        write_json(arguments.answer / "answer.json", probes.device_facts())
        return
    fact = probes.all_reduce(distributed.start(configuration.ResourcesConfig(device=device)))  # type: ignore[arg-type]
    distributed.stop()
    if fact["rank"] == 0:
        write_json(arguments.answer / "answer.json", fact)


def laws(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.laws.report import fit

    fit(
        arguments.target, noise=arguments.noise, draws=arguments.draws, seed=arguments.seed, baseline=arguments.baseline,
        figure=arguments.figure, as_json=arguments.json,
    )  # fmt: skip


def recipe_figures(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.laws.recipe_figure import recipe_figure

    recipe_figure(arguments.target, arguments.figure)


def finish(arguments: Namespace, overrides: list[str]) -> None:
    from trainer.finish import finish as finished

    finished(arguments.target)


def _checkpoint_options(parser: ArgumentParser) -> None:
    parser.add_argument("--step", type=int, default=None)


def _weights_options(parser: ArgumentParser) -> None:
    _checkpoint_options(parser)
    parser.add_argument("--export", type=Path, default=None)


def _export_options(parser: ArgumentParser) -> None:
    _checkpoint_options(parser)
    parser.add_argument("--to", type=Path, default=None)


def _average_options(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--decay", type=float, default=None)
    parser.add_argument("--to", type=Path, default=None)


def _evaluate_options(parser: ArgumentParser) -> None:
    _weights_options(parser)
    parser.add_argument("--tasks", type=Path, nargs="*", default=[])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--answer", type=Path, required=True)


def _ensemble_options(parser: ArgumentParser) -> None:
    parser.add_argument("--tasks", type=Path, nargs="*", default=[])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--most", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--answer", type=Path, required=True)


def _cache_options(parser: ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--form", choices=["hidden", "top-k", "sampled"], required=True)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--offload", choices=["cpu", "disk"], default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answer", type=Path, required=True)


def _harness_options(parser: ArgumentParser) -> None:
    _weights_options(parser)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--answer", type=Path, required=True)


def _answer_options(parser: ArgumentParser) -> None:
    parser.add_argument("--answer", type=Path, required=True)


def _laws_options(parser: ArgumentParser) -> None:
    parser.add_argument("--noise", type=float, default=None)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--baseline", default=None)
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--json", action="store_true")


def _recipe_options(parser: ArgumentParser) -> None:
    parser.add_argument("--figure", type=Path, required=True)


def _generate_options(parser: ArgumentParser) -> None:
    _weights_options(parser)
    _prompt_options(parser)


def _sample_options(parser: ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--answer", type=Path, required=True)


def _prompt_options(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", action="store_true")


TASKS: dict[str, Task] = {
    "prepare": Task("make the token table", prepare, overrides=True),
    "verify-table": Task("check a token table", verify_table),
    "export": Task("a checkpoint in the Hugging Face format", export, _export_options),
    "average": Task("the average of several checkpoints in the Hugging Face format", average, _average_options),
    "evaluate": Task("validation loss and multiple choice, on every rank", evaluate, _evaluate_options, overrides=True),
    "evaluate-ensemble": Task(
        "losses of an ensemble and its subsets, on every rank", evaluate_ensemble, _ensemble_options, overrides=True
    ),
    "cache-targets": Task(
        "a teacher's targets for all training sequences, on every rank", cache_targets, _cache_options, overrides=True
    ),
    "harness": Task("tasks of lm-eval on an export", harness, _harness_options),
    "generate": Task("continue prompts", generate, _generate_options),
    "generate-ensemble": Task("continue prompts by the rule of an ensemble", generate_ensemble, _prompt_options),
    "sample": Task("a token table of synthetic text, on every rank", sample, _sample_options, overrides=True),
    "shapes": Task("shapes of parameters and state, bytes of activations", shapes, _answer_options),
    "probe": Task("what torch sees of this machine; `all-reduce-DEVICE` on every rank", probe, _answer_options),
    "laws": Task("fit scaling laws to a table of points", laws, _laws_options),
    "recipe-figures": Task("draw the figures of a recipe's report", recipe_figures, _recipe_options),
    "finish": Task("verify, export, figure, sample", finish),
}


def run(name: str, arguments: Namespace, overrides: list[str]) -> Any:
    """Do a task."""
    if name not in ("prepare", "probe", "laws"):
        from transformers.utils import logging

        logging.disable_progress_bar()
    TASKS[name].work(arguments, overrides)
