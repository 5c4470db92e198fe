"""Text samples during training: `evaluate.prompts` continued at every validation, into `samples.jsonl` and onto the screen.

The run is the same to the bit with and without them: no gradient, no dropout, random numbers of their own. Every rank
makes the same forwards; rank 0's choices are everybody's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.evaluate.sampling import Sampling
from trainer.evaluate.text import generate, load_tokenizer
from trainer.metrics.history import History

FILE = "samples.jsonl"


class Samples:
    """Samples of one run on one rank."""

    def __init__(self, folder: Path, prompts: list[str], tokens: int, seed: int) -> None:
        self.prompts = prompts
        self.tokenizer = load_tokenizer(folder) if prompts else None
        self.sampling = Sampling(tokens=tokens, seed=seed)
        self.path = folder / FILE

    def take(self, run: Any) -> None:
        """Continue the prompts with the model as it is; collective over all ranks."""
        if not self.prompts:
            return
        run.model.eval()
        room = run.config.data.sequence_length
        # Compiled blocks would be compiled anew for the lengths of texts.
        with torch.compiler.set_stance("force_eager"), run.strategy.context():
            pieces = generate(
                run.model, self.tokenizer, self.prompts, self.sampling, room=room, device=run.device,
                batch=len(self.prompts),
            )  # fmt: skip
            texts = [text for _, _, text in pieces if text is not None]
        run.model.train()
        run.strategy.settle(run.model)
        if distributed.rank() == 0:
            history = History(self.path)
            for text in texts:
                history.write(step=run.step, prompt=text.prompt, continuation=text.continuation)
                run.progress.say(f"step {run.step}: {text.prompt}{text.continuation}")
            history.close()
