"""The table of points, and `orthogon laws fit` on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from trainer.laws.figure import laws_figure
from trainer.laws.nested import limits
from trainer.laws.points import read
from trainer.outcome import RunError

ROOT = Path(__file__).parents[2]
SINGLE = "n,loss\n150M,3.776\n0.3B,3.601\n600M,3.514\n1.4B,3.465\n"


def table(folder: Path, text: str, name: str = "points.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def orthogon(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_suffixes_are_billions_and_json_reads_as_csv(tmp_path) -> None:
    csv = read(table(tmp_path, SINGLE + "\n"))[""]
    rows = [
        {"n": n, "loss": y, "run": None}
        for n, y in (("150M", 3.776), ("0.3B", 3.601), ("600M", 3.514), ("1.4B", 3.465))
    ]
    listed = read(table(tmp_path, json.dumps(rows), "points.json"))[""]
    assert (
        [p.coords for p in csv]
        == [p.coords for p in listed]
        == [{"n": pytest.approx(n)} for n in (0.15, 0.3, 0.6, 1.4)]
    )
    assert [p.loss for p in csv] == [p.loss for p in listed]


def test_empty_cells_are_no_axes_and_recipes_are_apart(tmp_path) -> None:
    found = read(table(tmp_path, "k,n,d,loss,recipe,seed\n,,0.2,3.7,standard,1\n2, 0.3, 0.2, 3.4, joint,\n"))
    assert found["standard"][0].coords == {"d": 0.2}
    assert found["standard"][0].labels == {"seed": "1"}
    assert found["joint"][0].coords == {"k": 2, "n": 0.3, "d": 0.2}


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("n,los\n1,3\n", "unknown column los", ":1"),
        ("n,loss\n1,nan\n", "loss = nan is no number above zero", ":2, column loss"),
        ("n,loss\n1,-3\n", "loss = -3 is no number above zero", ":2, column loss"),
        ("n,loss\n1,3\n2,\n", "the point has no loss", ":3, column loss"),
        ("n,loss\n0,3\n", "n = 0 is no number above zero", ":2, column n"),
        ("n,loss\nmany,3\n", "n = many is no number above zero", ":2, column n"),
        ("k,loss\n1.5,3\n", "k = 1.5 is no whole number", ":2, column k"),
        ("n,loss\n300M,3\n0.6,3\n", "mixed units: '300M'", ":3, column n"),
        ("n,loss\n0.3,3\n600000000,3\n", "mixed units: 6e+08, and 0.3", ":3, column n"),
        ("n,loss\n1,3,4\n", "the line has not 2 cells", ":2"),
        ("n,d,loss\n1,2,3\n1,,3\n", "a point has no d, another one has", ":3, column d"),
        ("loss\n3\n", "the point has none of k, n, d", ":2"),
        ("n,loss\n", "the table has no points", ""),
    ],
)
def test_a_bad_table_is_told_with_line_and_column(tmp_path, text, what, where) -> None:
    path = table(tmp_path, text)
    with pytest.raises(RunError) as caught:
        read(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}{where}"
    assert caught.value.mend


def test_an_unknown_column_has_its_nearest_name(tmp_path) -> None:
    for path in (table(tmp_path, "n,Los\n1,3\n"), table(tmp_path, '[{"n": 1, "Los": 3}]', "points.json")):
        with pytest.raises(RunError) as caught:
            read(path)
        assert caught.value.mend == "did you mean loss?"


def test_the_command_prints_laws_and_their_figure(tmp_path) -> None:
    done = orthogon("laws", "fit", str(table(tmp_path, SINGLE)), "--noise=0.01", f"--figure={tmp_path}/out/laws.png")
    assert done.returncode == 0, done.stderr
    assert "over n       4  0.05091  1.012" in done.stdout
    assert "noise of a loss: 0.01 (as given)" in done.stdout
    assert (tmp_path / "out/laws.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_prints_efficiency_and_json(tmp_path) -> None:
    rows = [f",{d},{1.282 / d**0.2306 + 1.9115},standard" for d in (0.2097, 0.4194, 0.8389, 1.6777)]
    rows += [f"{n},0.2097,{0.05 / n + 3.17},joint" for n in (0.15, 0.3, 0.6, 1.4)]
    rows += [f"{n},0.4194,{0.05 / n + 3.0},joint" for n in (0.15, 0.3, 0.6, 1.4)]
    rows += [f"{n},0.8389,{0.05 / n + 2.8},joint" for n in (0.15, 0.3, 0.6, 1.4)]
    path = str(table(tmp_path, "\n".join(["n,d,loss,recipe", *rows])))
    done = orthogon("laws", "fit", path, "--baseline", "standard", "--json", "--noise=0.005")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [(law["recipe"], law["axis"]) for law in answer["laws"]] == [
        ("standard", "d"), ("joint", "n"), ("joint", "n"), ("joint", "n"), ("joint", "d"),
    ]  # fmt: skip
    assert answer["efficiency"][0]["limit_ratio"] == pytest.approx(5.17, abs=0.01)
    assert answer["efficiency"][0]["observed_at"] == {"n": 1.4}
    done = orthogon("laws", "fit", path, "--baseline", "standard", "--noise=0.005")
    assert "joint, d = 0.2097: observed 3.2057 at n = 1.4: 4.58x; extrapolated limit 3.1700: 5.17x [" in done.stdout


def test_the_command_refuses_with_one_sentence_and_78(tmp_path, capsys) -> None:
    done = orthogon("laws", "fit", str(table(tmp_path, "n,loss\n1,3\n2,2.9\n")))
    assert (done.returncode, done.stdout) == (78, "")
    assert "needs at least 3 distinct n, and there are 2: n = 1, 2" in done.stderr
    assert f"where: {tmp_path}/points.csv:2" in done.stderr
    for option in ("--noise=0", "--draws=10", "--seed=-1"):
        with pytest.raises(RunError, match="noise|draws|seed"):
            cli.dispatch(["laws", "fit", "points.csv", option])


@pytest.mark.parametrize("target", ["laws.nonsense", "points.csv/laws.png"])
def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path, target) -> None:
    fits = {"": limits(read(table(tmp_path, SINGLE))[""], draws=100)}
    with pytest.raises(RunError, match="the figure cannot be written"):
        laws_figure(fits, tmp_path / target, "points")
