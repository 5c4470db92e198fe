"""The verb generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import UseAppendAction, arg

from launch import process
from launch.verbs.options import Export, Json, RunName, Runs, Step, weights
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with a checkpoint; the text appears as it is made.

    The same command gives the same text. A text ends at the model's end-of-text token, after --tokens, or where the
    model takes no more.
    """

    OVERRIDES: ClassVar[bool] = False
    run: RunName
    prompt: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """A text to continue; give it several times for several texts."""
    prompts: Path | None = None
    """A file of further prompts, one per line."""
    tokens: int = 128
    """Most tokens to add to each."""
    temperature: float = 0.8
    """Spread of the choices; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the choices."""
    batch: int = 1
    """Prompts that go through the model at once; with more than one, a text appears when its batch is done."""
    step: Step = None
    export: Export = None
    json: Json = False
    runs: Runs = Path("runs")

    def __call__(self, overrides: list[str]) -> int:
        folder = process.run_folder(self.run, self.runs)
        if not self.prompt and self.prompts is None:
            raise RunError("there is no prompt", where="command line", mend='give --prompt "Once upon a time"')
        for name, good, must in (
            ("tokens", self.tokens > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top-k", self.top_k is None or self.top_k > 0, "above 0"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("batch", self.batch > 0, "above 0"),
        ):
            if not good:
                value = getattr(self, name.replace("-", "_"))
                raise RunError(f"--{name} is {value}", where="command line", mend=f"it must be {must}")
        return process.task(
            "generate", str(folder), *weights(folder, self.step, self.export), *(f"--prompt={prompt}" for prompt in self.prompt),
            *([f"--prompts={self.prompts}"] if self.prompts is not None else []),
            f"--tokens={self.tokens}", f"--temperature={self.temperature}", f"--top-p={self.top_p}",
            *([f"--top-k={self.top_k}"] if self.top_k is not None else []), f"--seed={self.seed}",
            f"--batch={self.batch}", *(["--json"] if self.json else []),
        )  # fmt: skip
