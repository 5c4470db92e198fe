"""The verb evaluate."""

from __future__ import annotations

import importlib.util
import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from launch import process
from launch.verbs.options import Export, Json, RunName, Runs, Step, weights
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a checkpoint: validation loss, bits per byte, multiple-choice tasks.

    The result is the same on any number of ranks (`--resources.ranks=N`; the run's own number otherwise). A task is a
    JSONL file with one question per line: {"query": text, "choices": [text, ...], "gold": index of the right one}.
    `--section.key=value` overrides what a resume may change, for this evaluation only.
    """

    OVERRIDES: ClassVar[bool] = True
    run: RunName
    tasks: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Multiple-choice tasks, scored by likelihood."""
    lm_eval: Annotated[tuple[str, ...], arg(metavar="TASK ...")] = ()
    """Tasks of lm-eval on the export (needs orthogon[lm-eval]; most load their data from the hub)."""
    lm_eval_folder: Path | None = None
    """A folder with YAML files of further lm-eval tasks."""
    limit: int | None = None
    """First so many questions of each lm-eval task."""
    split: Literal["validation", "test"] = "validation"
    """The text that the loss is measured on; `test` needs `data.test_path` or `data.test_fraction`, set before training."""
    step: Step = None
    export: Export = None
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        from launch.backends import torchrun

        folder, config = process.opened(self.run, self.runs, overrides)
        if self.lm_eval and importlib.util.find_spec("lm_eval") is None:
            raise RunError(
                "lm-eval is not installed", where="evaluate --lm-eval", mend="pip install 'orthogon[lm-eval]'"
            )
        if (self.lm_eval_folder is not None or self.limit is not None) and not self.lm_eval:
            raise RunError("no lm-eval task is named", where="command line", mend="add --lm-eval TASK")
        for task in self.tasks:
            if not task.is_file():
                raise RunError(f"there is no task {task}", where="command line, --tasks", mend="check the path")
        chosen = weights(folder, self.step, self.export)
        tasks = ["--tasks", *map(str, self.tasks)] if self.tasks else []
        found = torchrun.answer(config, "evaluate", str(folder), *chosen, *overrides, *tasks, f"--split={self.split}")
        if self.lm_eval:
            more = ["--tasks", *self.lm_eval]
            more += [f"--include={self.lm_eval_folder}"] if self.lm_eval_folder is not None else []
            more += [f"--limit={self.limit}"] if self.limit is not None else []
            found["lm_eval"] = torchrun.answer(config, "harness", str(folder), *chosen, *more, alone=True)["tasks"]
        if self.json:
            print(json_format.dumps(found))
        else:
            show(found)
        return 0


def show(found: dict[str, Any]) -> None:
    """Print the results for people."""
    split = "test" if "test" in found else "validation"
    measured = found[split]
    trained = f" after {found['sequences_trained_on']:,} sequences" if "step" in found else ""
    print(f"run {found['run']}, {found.get('checkpoint') or found['export']}{trained}")
    unigram = f", {measured['share_of_unigram']:.1%} of the unigram entropy" if "share_of_unigram" in measured else ""
    print(
        f"{split}  loss {measured['loss']:.4f}  {measured['bits_per_byte']:.4f} bits per byte{unigram} "
        f"({measured['tokens']:,} tokens, {measured['bytes']:,} bytes)"
    )
    if "tasks" in found:
        width = max([4, *map(len, found["tasks"])])
        print(f"\n{'task':{width}}  questions  accuracy (raw)   accuracy (per byte)  chance  gold bits/byte")
        for name, task in found["tasks"].items():
            raw = f"{task['accuracy']:.4f} ± {task['accuracy_error']:.4f}"
            per_byte = f"{task['accuracy_per_byte']:.4f} ± {task['accuracy_per_byte_error']:.4f}"
            print(
                f"{name:{width}}  {task['questions']:>9,}  {raw:15}  {per_byte:19}  {task['chance']:.4f}  "
                f"{task['gold_bits_per_byte']:>14.4f}"
            )
        for name, task in found["tasks"].items():
            if task["rows_cut"]:
                print(f"{name}: {task['rows_cut']} rows were too long for the model and lost their beginning")
    for name, metrics in found.get("lm_eval", {}).items():
        print(f"\nlm-eval {name}")
        for metric, value in metrics.items():
            print(f"  {metric:24} {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'}")
