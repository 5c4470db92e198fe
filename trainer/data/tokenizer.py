"""A byte-level BPE trained on the training documents, or any `transformers` tokenizer from a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.files import digest, sha256_file
from trainer.outcome import RunError

BOS, EOS = "<|bos|>", "<|eos|>"


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it as a `transformers` tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a local folder.

    Raises:
        RunError: there is none, it is no fast tokenizer, or it marks neither beginnings nor ends of documents.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise RunError(f"there is no tokenizer folder {folder}", where="data.tokenizer.path", mend="check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises its own kinds
        text = " ".join(str(error).split())[:200]
        raise RunError(
            f"no tokenizer can be loaded: {text}", where=str(folder), mend="give a tokenizer folder"
        ) from None
    if not tokenizer.is_fast:
        raise RunError("the tokenizer is a slow one, without offsets", where=str(folder), mend="save its fast form")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RunError(
            "the tokenizer has neither BOS nor EOS", where=str(folder), mend="add one: documents need a border"
        )
    return tokenizer


def given_digest(path: str) -> str:
    """The digest of the tokenizer that a configuration names.

    Raises:
        RunError: there is no such folder.
    """
    if not Path(path).is_dir():
        raise RunError(f"there is no tokenizer folder {path}", where="data.tokenizer.path", mend="check the path")
    return tokenizer_digest(Path(path))


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of `tokenizer.json`, or of all files where there is none."""
    main = folder / "tokenizer.json"
    if main.exists():
        return sha256_file(main)
    return digest({f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.is_file()})
