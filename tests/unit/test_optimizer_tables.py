"""The tables of docs/optimizers.md: current, and in agreement with figures known from elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import optimizer_tables as tables
from trainer.optim.polar import reference


@pytest.mark.parametrize("name", tables.CHEAP)
def test_tables_that_need_no_measurement_are_current(name) -> None:
    page = tables.PAGE.read_text()
    assert tables.written(page, name, tables.CHEAP[name]()) == page, "run `make tables`"


def test_check_fails_on_an_old_table(tmp_path, monkeypatch) -> None:
    page = tmp_path / "optimizers.md"
    page.write_text(tables.PAGE.read_text().replace("| 549.3 |", "| 548.3 |"))
    monkeypatch.setattr(sys, "argv", ["optimizer_tables.py", "--check"])
    tables.main()
    monkeypatch.setattr(tables, "PAGE", page)
    with pytest.raises(SystemExit, match="table 'plan' of docs/optimizers.md is not current"):
        tables.main()


def test_cheap_tables_load_no_torch() -> None:
    code = (
        "import sys; from benchmarks import optimizer_tables as t; t.polynomial_errors(); t.planned('Llama-3-8B', 8); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tables.PAGE.parents[1], check=False).returncode == 0


def test_a_page_without_the_markers_is_refused() -> None:
    page = "<!-- table: a -->\nold\n<!-- end -->\n<!-- table: b -->\n<!-- end -->"
    assert tables.written(page, "a", "new") == page.replace("old", "new")
    for broken in ("old", page.replace("old\n<!-- end -->\n", "old\n")):
        with pytest.raises(SystemExit, match="put both there"):
            tables.written(broken, "a", "new")


# Errors of published coefficients on the same spectra, computed apart from this code.
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("simple", "5.0e-2 3.4e-2 3.4e-2 4.2e-2 6.4e-2 5.0e-2 1.5e-1 8.0e-1"),
        ("quintic", "2.2e-2 7.1e-4 2.9e-4 3.1e-4 3.1e-2 3.6e-4 1.4e-1 8.0e-1"),
        ("polar-express", "1.9e-2 9.2e-3 9.2e-3 9.5e-3 2.4e-2 9.3e-3 2.1e-2 7.1e-1"),
        ("cans", "1.6e-2 6.4e-3 6.4e-3 6.4e-3 2.0e-2 6.5e-3 1.5e-2 6.9e-1"),
        ("8+2", "7.7e-5 7.5e-8 7.3e-8 3.7e-8 1.8e-4 4.7e-8 2.9e-8 5.9e-7"),
    ],
)
def test_errors_of_known_coefficients(name, known) -> None:
    row = [error for key, error in tables.polynomial_errors()[name, "frobenius"].items() if key != "i^-0.5"]
    for error, text in zip(row, known.split(), strict=True):
        # Half a unit of the second digit for its rounding, a fifth for another discretization of the law.
        assert error == pytest.approx(float(text), abs=0.7 * float("0.1e" + text.partition("e")[2])), (row, known)


def test_the_errors_are_those_of_a_gaussian_matrix() -> None:
    x = torch.randn(192, 288, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.linalg.svdvals(x).numpy()
    law = tables.gaussian_spectrum(288, 192)
    assert sigma[::-1] / (sigma**2).mean() ** 0.5 == pytest.approx(law / (law**2).mean() ** 0.5, abs=0.02)
    for preset in tables.PRESETS:
        factor = reference(x[None], *preset)
        error, distance = tables.figures(factor, factor)
        assert (error, distance) == pytest.approx((tables.polynomial_error(sigma, *preset), 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "ranks", "known"),  # MB to other ranks: optimum, padded; work: ours, padded
    [
        ("Llama-3-8B", 64, (429, 545, 1.06, 1.26)),
        ("Llama-3-8B", 128, (216, 549, 1.06, 2.53)),
        ("Llama-3-70B", 256, (1065, 2173, 1.17, 2.03)),
    ],
)
def test_bytes_and_balance_against_known_figures(model, ranks, known) -> None:
    plan = tables.planned(model, ranks)
    found = plan["MB: optimum"], plan["MB: dion"], plan["work: ours"], plan["work: dion"]
    assert found == pytest.approx(known, rel=0.005)
    assert plan["MB: mean"] <= 1.05 * plan["MB: optimum"]


def test_a_norm_per_shard_changes_tall_matrices_and_no_wide_ones() -> None:
    differences = [difference for difference, _, _ in tables.per_shard((512, 128), "8+2", 1.0, 0)]
    assert 0.01 < differences[0] < differences[1] < differences[2]
    assert differences[2] == pytest.approx(0.2, abs=0.1)
    assert max(difference for difference, _, _ in tables.per_shard((64, 256), "8+2", 1.0, 0)) < 1e-3
