"""The verb generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, UseAppendAction, arg

from launch import process
from launch.verbs.options import Export, Json, RunName, Runs, Step, weights
from trainer.ensemble import manifest
from trainer.outcome import RunError

Texts = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(metavar="TEXT", help="A text to continue; give it several times for several texts."),
]
File = Annotated[Path | None, arg(help="A file of further prompts, one per line.")]
Tokens = Annotated[int, arg(help="Most tokens to add to each.")]
Temperature = Annotated[float, arg(help="Spread of the choices; 0 takes the likeliest token.")]
TopK = Annotated[int | None, arg(help="Choose among the k likeliest tokens only.")]
TopP = Annotated[float, arg(help="Choose among the likeliest tokens that hold this share of the probability.")]
Seed = Annotated[int, arg(help="Seed of the choices.")]
Batch = Annotated[
    int,
    arg(help="Prompts that go through the model at once; with more than one, a text appears when its batch is done."),
]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with a checkpoint; the text appears as it is made.

    The same command gives the same text. A text ends at the model's end-of-text token, after --tokens, or where the
    model takes no more.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    prompt: Texts = ()
    prompts: File = None
    tokens: Tokens = 128
    temperature: Temperature = 0.8
    top_k: TopK = None
    top_p: TopP = 0.95
    seed: Seed = 0
    batch: Batch = 1
    step: Step = None
    export: Export = None
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        words = options(self)
        return process.task("generate", str(folder), *weights(folder, self.step, self.export), *words)


@dataclass(frozen=True, kw_only=True)
class GenerateEnsemble:
    """Continue prompts with an ensemble, whose members are one model by its rule.

    All members are in memory at once. Options and endings are those of `orthogon generate`.
    """

    OVERRIDES: ClassVar[bool] = False
    name: Annotated[Positional[str], arg(metavar="ENSEMBLE", help="The ensemble's name.")]
    prompt: Texts = ()
    prompts: File = None
    tokens: Tokens = 128
    temperature: Temperature = 0.8
    top_k: TopK = None
    top_p: TopP = 0.95
    seed: Seed = 0
    batch: Batch = 1
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        manifest.read(self.runs, self.name)
        return process.task("generate-ensemble", str(manifest.folder_of(self.runs, self.name)), *options(self))


def options(verb: Generate | GenerateEnsemble) -> list[str]:
    """What to continue, and how, as options of the task.

    Raises:
        RunError: there is no prompt, or a number is out of its range.
    """
    if not verb.prompt and verb.prompts is None:
        raise RunError("there is no prompt", where="command line", mend='give --prompt "Once upon a time"')
    for name, good, must in (
        ("tokens", verb.tokens > 0, "above 0"),
        ("temperature", verb.temperature >= 0, "0 or above"),
        ("top-k", verb.top_k is None or verb.top_k > 0, "above 0"),
        ("top-p", 0 < verb.top_p <= 1, "above 0 and at most 1"),
        ("batch", verb.batch > 0, "above 0"),
    ):
        if not good:
            value = getattr(verb, name.replace("-", "_"))
            raise RunError(f"--{name} is {value}", where="command line", mend=f"it must be {must}")
    return [
        *(f"--prompt={prompt}" for prompt in verb.prompt),
        *([f"--prompts={verb.prompts}"] if verb.prompts is not None else []),
        f"--tokens={verb.tokens}", f"--temperature={verb.temperature}", f"--top-p={verb.top_p}",
        *([f"--top-k={verb.top_k}"] if verb.top_k is not None else []), f"--seed={verb.seed}",
        f"--batch={verb.batch}", *(["--json"] if verb.json else []),
    ]  # fmt: skip
