"""Text from an exported model, with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(
    export: Path, prompts: list[str], *, tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Continue each prompt by up to `tokens` tokens; temperature 0 always takes the likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(export, local_files_only=True, dtype=torch.float32).eval()
    room = model.config.max_position_embeddings
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        ids = ids[-max(1, room - tokens) :]
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=min(tokens, room - len(ids)),
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        yield tokenizer.decode(output[0], skip_special_tokens=True)
