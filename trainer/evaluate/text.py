"""Text to a model's tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.evaluate.sampling import Sampling, continuations
from trainer.model.init import module_seed
from trainer.outcome import RunError


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation."""

    prompt: str
    continuation: str
    tokens: int
    """New tokens."""
    ended: str
    """Why it stops: `end of text`, `tokens` (as many as were asked for) or `context` (the model takes no more)."""
    cut: int
    """Tokens at the beginning of the prompt that the model did not get, because they left it no room."""


def load_tokenizer(run: Path) -> Any:
    """The tokenizer of a run. Markers such as `<|eos|>` written in a text stay text, as they do in training."""
    from transformers import AutoTokenizer

    if not (run / "tokenizer").is_dir():
        raise RunError(
            f"run {run.name} has no tokenizer yet", where=str(run / "tokenizer"), mend="its first attempt brings it"
        )
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True, trust_remote_code=False)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


def beginning(tokenizer: Any) -> list[int]:
    """What stands before a document in training: BOS, else the EOS of the document before."""
    marker = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [marker] if marker is not None else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as the beginning of a document."""
    return beginning(tokenizer) + tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    sampling: Sampling,
    *,
    room: int,
    device: torch.device,
    batch: int = 1,
) -> Iterator[tuple[int, str, Text | None]]:
    """Continue prompts, `batch` of them at a time.

    A prompt that leaves the model no room is cut on the left to half of it.

    Yields:
        (index of the prompt, new piece of text, None) as text appears, and (index, "", Text) at its end.
    """
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        full = [encode(tokenizer, prompt) for prompt in some]
        ids = [row if len(row) < room else row[-(room // 2) :] for row in full]
        stream = continuations(
            model, ids, sampling,
            seeds=[module_seed(sampling.seed, f"prompt {first + i}") for i in range(len(some))],
            vocab_size=len(tokenizer), end=tokenizer.eos_token_id, room=room, device=device,
        )  # fmt: skip
        new: list[list[int]] = [[] for _ in some]
        told = ["" for _ in some]
        for tokens in stream:
            for i, token in enumerate(tokens):
                if token is not None:
                    new[i].append(token)
                    text = _continuation(tokenizer, ids[i], new[i])
                    if not text.endswith("\ufffd"):  # a character may need several tokens
                        yield first + i, text[len(told[i]) :], None
                        told[i] = text
        for i, prompt in enumerate(some):
            text = _continuation(tokenizer, ids[i], new[i])
            yield first + i, text[len(told[i]) :], None
            done = len(new[i]) == sampling.tokens
            ended = "tokens" if done else "context" if len(ids[i]) + len(new[i]) == room else "end of text"
            yield first + i, "", Text(prompt, text, len(new[i]), ended, len(full[i]) - len(ids[i]))


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text that `new` adds to the prompt: some tokenizers drop a space at the beginning of what they decode."""
    near = prompt[-8:]
    known = tokenizer.decode(near, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(near + new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return whole[len(known) :]
