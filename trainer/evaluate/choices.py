"""Multiple choice by likelihood: the choice to which the model gives the highest probability after the query.

A task is a JSONL file, one question per line: `{"query": "The capital of France is", "choices": [" Paris", " Rome"],
"gold": 0}`. Query and choice are joined as they stand, so the space between them belongs to one of the two, best to
the choice. Other keys are left alone. A query may hold worked examples: few-shot is the file's business.

Two scores (as in the evaluation of GPT-3, arXiv 2005.14165, section 2.4): the sum of the log-probabilities of the choice's tokens
("raw"), and that sum per UTF-8 byte of the choice ("per byte"), which does not favour short choices and does not depend
on the tokenizer. Equal scores go to the choice that stands first. Beside the accuracies stands what the right choices cost in
bits per byte: it moves smoothly where an accuracy is still chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import distributed
from trainer.evaluate.text import beginning
from trainer.model.loss import MASKED
from trainer.outcome import RunError


@dataclass(frozen=True)
class Question:
    query: str
    choices: list[str]
    gold: int
    """Index of the right choice."""
    where: str
    """File and line."""


@dataclass(frozen=True)
class Row:
    """One question with one of its choices, as tokens."""

    ids: list[int]
    start: int
    """Index of the choice's first token; it and all after it are scored."""
    cut: int
    """Tokens that were cut off on the left because the row was too long."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a task's file.

    Raises:
        RunError: file and line of the first thing that is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the task cannot be read: {error}", where=str(path), mend="check the path") from None
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise RunError("the task has no question", where=str(path), mend='one per line: {"query", "choices", "gold"}')
    return questions


def _question(line: str, where: str) -> Question:
    shape = 'a line is {"query": text, "choices": [text, text, ...], "gold": index of the right one}'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"no valid JSON: {error}", where=where, mend=shape) from None
    if not isinstance(record, dict):
        raise RunError("the line is no JSON object", where=where, mend=shape)
    query, choices, gold = (record.get(key) for key in ("query", "choices", "gold"))
    if not isinstance(query, str):
        raise RunError("'query' is missing or no text", where=where, mend=shape)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise RunError("'choices' is no list of two or more texts", where=where, mend=shape)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise RunError(f"'gold' is {gold!r}, no index from 0 to {len(choices) - 1}", where=where, mend=shape)
    return Question(query, choices, gold, where)


def row(tokenizer: Any, query: str, choice: str, length: int, where: str = "") -> Row:
    """Tokens of query and choice together, as the beginning of a document; at most `length` + 1 of them.

    A token that reaches over the border belongs to the choice: its probability is part of what the choice costs.

    Raises:
        RunError: the choice alone is too long.
    """
    encoding = tokenizer.backend_tokenizer.encode(query + choice, add_special_tokens=False)
    first = next((i for i, (_, stop) in enumerate(encoding.offsets) if stop > len(query)), len(encoding.ids) - 1)
    prefix = beginning(tokenizer)
    ids, start = prefix + list(encoding.ids), len(prefix) + first
    start = max(start, 1)  # the first token of all has nothing before it
    cut = max(0, len(ids) - (length + 1))
    if cut >= start:
        raise RunError(
            f"a choice has {len(ids) - start} tokens, the model takes {length}",
            where=f"{where}, choice {choice[:40]!r}",
            mend="shorten the choice, or evaluate a run with longer sequences",
        )
    return Row(ids[cut:], start - cut, cut)


def batches_of(rows: list[Row], batch: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """This rank's batches: (indices of their rows, inputs, targets), the tensors of shape (rows, width).

    A batch is the same rows at the same width on any number of ranks, and whole batches go round the ranks. Every rank gets
    as many; one that has nothing left goes along with a batch that has no index.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    world = distributed.world()
    for turn in range(0, len(batches), world):
        number = turn + distributed.rank()
        members = batches[number] if number < len(batches) else batches[0]
        width = max(len(rows[i].ids) for i in members) - 1
        inputs = torch.zeros(len(members), width, dtype=torch.int64)
        targets = torch.full((len(members), width), MASKED)
        for place, i in enumerate(members):
            ids = torch.tensor(rows[i].ids)
            inputs[place, : len(ids) - 1] = ids[:-1]
            targets[place, rows[i].start - 1 : len(ids) - 1] = ids[rows[i].start :]
        yield members if number < len(batches) else [], inputs, targets


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[Row], batch: int, context: Any, device: torch.device) -> list[float]:
    """Log-probability of each row's choice, in nats; collective over all ranks, which all get all of them, the same on any
    number of ranks."""
    found = [0.0] * len(rows)
    for members, inputs, targets in batches_of(rows, batch):
        with context():
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().to(device), ignore_index=MASKED, reduction="none"
        )
        for i, loss in zip(members, losses.view_as(targets).double().sum(1).tolist(), strict=False):
            found[i] = -loss
    return distributed.sum_over_ranks(found, device)


def score(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    *,
    length: int,
    batch: int,
    context: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy of the choices that the model finds likeliest, raw and per byte, with standard errors."""
    rows = rows_of(tokenizer, questions, length)
    return graded(questions, rows, log_likelihoods(model, rows, batch, context, device))


def rows_of(tokenizer: Any, questions: list[Question], length: int) -> list[Row]:
    """Every question with each of its choices, in order.

    Raises:
        RunError: a choice alone is too long.
    """
    return [row(tokenizer, one.query, choice, length, one.where) for one in questions for choice in one.choices]


def graded(questions: list[Question], rows: list[Row], found: list[float]) -> dict[str, Any]:
    """The accuracies that follow from the log-probabilities of the rows' choices, in nats."""
    raw = per_byte = place = 0
    cost = []
    for question in questions:
        likelihoods = found[place : place + len(question.choices)]
        place += len(question.choices)
        densities = [value / len(c.encode()) for value, c in zip(likelihoods, question.choices, strict=True)]
        raw += likelihoods.index(max(likelihoods)) == question.gold
        cost.append(-densities[question.gold] / math.log(2))
        per_byte += densities.index(max(densities)) == question.gold
    count = len(questions)
    return {
        "questions": count,
        "accuracy": raw / count,
        "accuracy_error": _standard_error(raw, count),
        "accuracy_per_byte": per_byte / count,
        "accuracy_per_byte_error": _standard_error(per_byte, count),
        "gold_bits_per_byte": math.fsum(cost) / count,
        "chance": sum(1 / len(question.choices) for question in questions) / count,
        "rows_cut": sum(one.cut > 0 for one in rows),
    }


def _standard_error(right: int, count: int) -> float:
    """Of a share of `count` independent questions."""
    return math.sqrt(right / count * (1 - right / count) / count)
