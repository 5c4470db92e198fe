"""What follows an attempt: the table of the policy, row by row."""

from __future__ import annotations

import pytest

from launch.retry import Again, Attempt, Stop, decide, digest_of
from trainer.outcome import Outcome

LOST, PREEMPTED, BUG = Outcome.INFRASTRUCTURE, Outcome.PREEMPTED, Outcome.BUG


def attempts(outcome: Outcome, *checkpoints: int, **facts: object) -> list[Attempt]:
    return [Attempt(outcome, checkpoint, **facts) for checkpoint in checkpoints]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("past", "restarts", "seconds", "words"),
    [
        # infrastructure and preemption: as long as the checkpoint advances, however often
        (attempts(LOST, 20), 3, 1, "advanced to step 20"),
        (attempts(LOST, *range(20, 2020, 20)), 3, 1, "advanced to step 2000"),
        (attempts(PREEMPTED, *range(20, 2020, 20)), 3, 1, "saved before it ended"),
        # without: three restarts, with growing pauses
        (attempts(LOST, 10), 3, 5, "restart 1 of 3"),
        (attempts(LOST, 10, 10), 3, 10, "restart 2 of 3"),
        (attempts(LOST, 10, 10, 10), 3, 20, "restart 3 of 3"),
        (attempts(LOST, 10, 10, 10, 10), 3, None, "4 attempts in a row made no newer checkpoint"),
        (attempts(PREEMPTED, 10, 10, 10, 10), 3, None, "no newer checkpoint"),
        (attempts(LOST, 10, 10), 1, None, "2 attempts in a row"),
        (attempts(LOST, *[10] * 8), 9, 300, "restart 8 of 9"),
        # progress begins a new count, an older checkpoint is none (the newest was damaged and moved aside)
        (attempts(LOST, 10, 10, 10, 12, 12), 3, 5, "restart 1 of 3"),
        (attempts(LOST, 15, 12, 12), 3, 10, "restart 2 of 3"),
        # one attempt
        (attempts(LOST, 20), 0, None, "one attempt"),
        (attempts(BUG, 20, traceback="a"), 0, None, "one attempt"),
        # asked for
        (attempts(PREEMPTED, 20, asked=True), 3, None, "a signal"),
        (attempts(LOST, 20, asked=True), 3, None, "a signal"),
        (attempts(BUG, 20, asked=True), 3, None, "a signal"),
        (attempts(PREEMPTED, 20, planned=True), 3, None, "time_limit"),
        # bugs
        (attempts(BUG, 10, traceback="a"), 3, 5, "seen 1 of 3 times"),
        (attempts(BUG, 10, 10, traceback="a"), 3, 10, "seen 2 of 3 times"),
        (attempts(BUG, 10, 10, 10, traceback="a"), 3, None, "the same traceback came 3 times"),
        (attempts(BUG, 20, 30, 40, traceback="a"), 3, None, "the same traceback came 3 times"),
        (attempts(BUG, 20, 30, traceback="a") + attempts(BUG, 40, traceback="b"), 3, 1, "seen 1 of 3 times"),
        ([Attempt(BUG, 10, name) for name in "abcd"], 3, None, "4 attempts in a row"),
        (attempts(BUG, 20, traceback="a") + attempts(LOST, 30) + attempts(BUG, 40, traceback="a"), 3, 1, "seen 2 of 3"),
        (attempts(BUG, 20, told=True), 3, None, "itself found"),
        # never
        (attempts(Outcome.FINISHED, 40), 3, None, "finished"),
        (attempts(Outcome.DIVERGED, 40), 3, None, "diverge"),
        (attempts(Outcome.OUT_OF_DATA, 40), 3, None, "no more data"),
        (attempts(Outcome.BAD_CONFIGURATION, 0), 3, None, "mended"),
        (attempts(Outcome.NO_SPACE, 40), 3, None, "room"),
    ],
)
def test_the_table(past, restarts, seconds, words) -> None:
    decision = decide(past, 10, restarts)
    assert isinstance(decision, Stop if seconds is None else Again)
    assert words in decision.why
    if isinstance(decision, Again):
        assert decision.seconds == seconds


TRACEBACK = """\
Traceback (most recent call last):
  File "/a/trainer/loop.py", line 31, in train
    verdict = forward_backward(run, count)
  File "/a/trainer/loop.py", line {line}, in forward_backward
    raise {kind}("step {step}")
{kind}: step {step}
"""


def test_tracebacks_are_equal_by_frames_and_kind_and_not_by_numbers_in_the_message() -> None:
    first = digest_of(TRACEBACK.format(line=7, kind="ValueError", step=3), "x")
    assert digest_of(TRACEBACK.format(line=7, kind="ValueError", step=99), "y") == first
    assert digest_of(TRACEBACK.format(line=8, kind="ValueError", step=3), "x") != first
    assert digest_of(TRACEBACK.format(line=7, kind="KeyError", step=3), "x") != first


def test_without_a_traceback_the_message_counts_without_its_numbers() -> None:
    assert digest_of("", "rank 1: ValueError: 0x7f12 at step 3") == digest_of("", "rank 0: ValueError: 0xab at step 4")
    assert digest_of("", "rank 1: ValueError") != digest_of("", "rank 1: KeyError")
