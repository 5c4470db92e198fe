"""Steps that go wrong: computed again, skipped, gone back from; the same on all ranks, and replayed after a resume."""

from __future__ import annotations

import json

import pytest

from tests.dist import bodies_run
from tests.dist.test_run import NAN, place  # noqa: F401  (place is a fixture)

SHORT = (
    "--train.length=16 steps",
    "--checkpoint.every=5 steps",
    "--guard.spike_window=16",
    "--evaluate.every=100 steps",
)


def train(group, place, name: str, faults: str = "", stop: int | None = None, *extra: str, verify: bool = False):  # noqa: F811
    overrides = [f"--name={name}", *SHORT, *extra]
    return group(2, bodies_run.train, str(place / "run.yaml"), overrides, stop, faults, verify)


@pytest.fixture(scope="module")
def calm(group, place):  # noqa: F811
    return train(group, place, "quiet")[0]


def kinds(result) -> list[str]:
    return [event["event"] for event in result["events"]]


@pytest.mark.parametrize("fault", ["nan@step.loss rank=1 step=5", "inf@step.gradient rank=0 step=5"])
def test_a_transient_fault_leaves_no_trace_in_the_run(group, place, calm, fault) -> None:  # noqa: F811
    result = train(group, place, fault.replace("@", "-").split()[0], fault)[0]
    assert result["tensors"] == calm["tensors"]
    assert result["history"] == calm["history"]
    assert result["skipped"] == []
    assert [e["finite"] for e in result["events"] if e["event"] == "recomputed"] == [True]


def test_the_window_of_a_lasting_fault_is_skipped_by_all_ranks(group, place, calm) -> None:  # noqa: F811
    results = train(group, place, "lasting", NAN.format(step=5))
    assert [r["skipped"] for r in results] == [[[32, 8]]] * 2
    assert results[0]["tensors"] == results[1]["tensors"] != calm["tensors"]
    record = next(r for r in results[0]["history"] if r["step"] == 5)
    assert "not finite" in record["skipped"]
    assert record["loss"] is None


def test_a_return_reaches_the_state_of_a_run_that_never_saw_the_steps(group, place, calm) -> None:  # noqa: F811
    """Against a run that skips, and so does not apply, all that lies between the checkpoint and the return."""
    back = train(group, place, "back", "; ".join(NAN.format(step=s) for s in (8, 9, 10)))[0]
    assert back["outcome"] == "finished"
    assert back["skipped"] == [[40, 40]]
    assert kinds(back).count("rolled back") == 1
    never = "; ".join(NAN.format(step=s) for s in (6, 7, 8, 9, 10))
    unseen = train(group, place, "unseen", never, None, "--guard.max_skips=99")[0]
    assert unseen["skipped"] == [[p, 8] for p in (40, 48, 56, 64, 72)]
    assert back["tensors"] == unseen["tensors"]
    assert [r["step"] for r in back["history"] if "loss" in r] == list(range(1, 17))
    assert back["tensors"] != calm["tensors"]


def test_a_spike_is_skipped_and_a_resume_goes_on_the_same(group, place, calm) -> None:  # noqa: F811
    fault = "scale=1000@step.loss step=11 rank=0"
    whole = train(group, place, "spike", fault)[0]
    assert whole["skipped"] == [[80, 8]]
    record = next(r for r in whole["history"] if r["step"] == 11)
    assert "a spike" in record["skipped"]
    assert record["loss"] > 100
    train(group, place, "spike-halves", fault, 13)
    halves = train(group, place, "spike-halves")[0]
    assert halves["started"] == 13
    assert halves["tensors"] == whole["tensors"]
    assert halves["history"] == whole["history"]
    off = train(group, place, "spike-off", fault, None, "--guard.spike_threshold=null")[0]
    assert off["skipped"] == []  # negative control: without the detector it is applied
    assert off["tensors"] != whole["tensors"]


def test_a_run_that_goes_back_too_often_diverges_and_keeps_a_good_checkpoint(group, place) -> None:  # noqa: F811
    sick = "; ".join(NAN.format(step=s) for s in range(3, 17))
    end = train(group, place, "lost", sick, None, "--guard.max_skips=2", "--guard.max_rollbacks=1")[0]
    assert end["outcome"] == "diverged"
    assert end["step"] == 6  # two skips, a return, two skips
    assert kinds(end).count("rolled back") == 1
    names = sorted(p.name for p in (place / "runs/lost/checkpoints").glob("step-*"))
    assert names == ["step-00000000", "step-00000004", "step-00000005"]  # the last is of the second streak


def test_a_verified_resume_trains_the_last_steps_again_and_goes_on(group, place, calm) -> None:  # noqa: F811
    train(group, place, "proof", "", 13)
    resumed = train(group, place, "proof", verify=True)[0]
    assert resumed["started"] == 13
    assert resumed["tensors"] == calm["tensors"]
    assert resumed["history"] == calm["history"]
    assert kinds(resumed).count("saved") == 6  # of steps 0, 5, 10, 13, 15, 16: none by the replay


def test_a_resume_that_is_another_run_is_named_and_refused(group, place) -> None:  # noqa: F811
    train(group, place, "forged", "", 13)
    file = place / "runs/forged/metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    forged = next(r for r in records if r["step"] == 12)
    forged["loss"] += 1e-15 * forged["loss"] * 8
    text = "".join(json.dumps(r) + "\n" for r in records)
    file.write_text(text)
    for result in train(group, place, "forged", verify=True):
        assert "step 12: loss was" in result["error"]
    assert file.read_text() == text
    for result in group(1, bodies_run.train, str(place / "run.yaml"), ["--name=forged", *SHORT], None, "", True):
        assert "saved by 2 ranks" in result["error"]
    assert train(group, place, "forged", "", 14)[0]["started"] == 13


def test_saves_in_the_background_change_nothing_but_the_time(group, place, calm) -> None:  # noqa: F811
    """One of them fails in its thread: the run goes on, says so at the next border, and the others are there."""
    fault = "ENOSPC@save.background rank=1 times=1 step={step}"
    result = train(group, place, "behind", "", None, "--checkpoint.asynchronous=true")[0]
    assert result["tensors"] == calm["tensors"]
    assert result["history"] == calm["history"]
    assert kinds(result).count("saved") == kinds(calm).count("saved") == 5  # of steps 0, 5, 10, 15, 16
    failed = train(group, place, "behind-full", fault.format(step=16), None, "--checkpoint.asynchronous=true")[0]
    assert failed["outcome"] == "no space"  # the last one: trained, and not saved
    assert "the last save failed" in failed["message"]
    resumed = train(group, place, "behind-full", "", None, "--checkpoint.asynchronous=true")[0]
    assert (resumed["started"], resumed["outcome"]) == (15, "finished")
    assert resumed["tensors"] == calm["tensors"]
