"""What two histories differ in, and the options of verbs that no process needs."""

from __future__ import annotations

import pytest

from launch.cli import dispatch, overview
from launch.verbs import VERBS, find
from launch.verbs.diff import common, first_difference
from trainer.outcome import RunError


def history(steps: int, changed: dict[int, float] | None = None, every: int = 4) -> list[dict]:
    records: list[dict] = []
    for step in range(1, steps + 1):
        loss = (changed or {}).get(step, 9.0 - step / 10)
        records.append({"step": step, "loss": loss, "seconds": hash((steps, step)) % 97})
        if step % every == 0:
            records.append({"step": step, "validation_bits_per_byte": loss / 4})
    return records


def test_the_first_difference_ignores_timings_and_what_only_one_run_has() -> None:
    assert first_difference(history(12), history(20)) is None
    found = first_difference(history(12), history(20, {7: 1.0, 9: 1.0}))
    assert found == {"step": 7, "equal_before": 6, "values": {"loss": [8.3, 1.0]}}
    nan = {5: float("nan")}
    assert first_difference(history(8, nan), history(8, nan)) is None
    later = [r for r in history(12) if r["step"] > 6]
    assert first_difference(history(12), later) is None
    more = [{**r, "gradient_norm": 1.0} for r in history(12)]
    assert first_difference(history(12), more) == {
        "step": 1, "equal_before": 0, "values": {"gradient_norm": [None, 1.0]},
    }  # fmt: skip


def test_common_steps_are_validated_ones_with_the_last_common_one() -> None:
    rows = {row["step"]: row for row in common(history(12), history(18))}
    assert len(rows) == 8
    assert rows.keys() >= {4, 8, 12}
    assert rows[4]["validation_bits_per_byte"] == [8.6 / 4, 8.6 / 4]
    assert rows[11] == {"step": 11, "loss": [7.9, 7.9], "validation_bits_per_byte": [None, None]}
    steps = [row["step"] for row in common(history(400), history(402))]
    assert steps == [56, 116, 172, 228, 284, 344, 400]
    bare = [r for r in history(12) if "loss" in r]
    assert len(common(bare, history(12))) == 8
    assert [row["step"] for row in common(history(3), history(9))] == [1, 2, 3]
    assert common(history(3), []) == []


def test_every_verb_has_one_line_of_help_that_fits(capsys) -> None:
    assert overview([]) == 0
    text = capsys.readouterr().out
    for name in VERBS:
        line = find(name).__doc__.splitlines()[0]
        assert line.endswith((".", ";")), name
        assert len(line) <= 100, name
        assert f"  {name} " in text
        assert line in text
    assert dispatch(["checkpoint"]) == 0
    assert "average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chekpoint"], "did you mean checkpoint"), (["checkpoint", "lits"], "did you mean checkpoint list"),
        (["quux", "x"], "verbs: run"), (["diff", "a", "b", "--zz"], "'--zz' is not understood"),
    ],
)  # fmt: skip
def test_a_wrong_word_gets_the_nearest(arguments, words) -> None:
    with pytest.raises(RunError) as found:
        dispatch(arguments)
    assert words in str(found.value)
