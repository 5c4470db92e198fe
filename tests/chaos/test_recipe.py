"""Recipes whose driver is killed at any moment, again and again: the same command goes on, and finds what a calm one finds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.dist.test_recipe import recipe, write_files

KILLS = 6


def found(place: Path) -> dict[str, Any]:
    """Losses of all runs and curves of all ensembles."""
    results = json.loads((place / "runs/recipes/tiny/results.json").read_text())
    curves = {name: ensemble["curves"] for name, ensemble in results["ensembles"].items()}
    return {"runs": {name: (run["loss"], run["train_loss"]) for name, run in results["runs"].items()}, "curves": curves}


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[str, Any]:
    """What a recipe finds that nobody disturbs."""
    place = tmp_path_factory.mktemp("calm")
    write_files(place)
    driver = recipe(place)
    text = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, text
    return found(place)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_a_recipe_whose_driver_is_killed_again_and_again_finds_the_same(tmp_path, calm, seed) -> None:
    moments = random.Random(seed)
    write_files(tmp_path)
    for _ in range(KILLS):
        driver = recipe(tmp_path)
        try:
            text = driver.communicate(timeout=moments.uniform(2.5, 11))[0]
        except subprocess.TimeoutExpired:
            os.kill(driver.pid, signal.SIGKILL)  # what it started goes on without it
            driver.wait()
            continue
        assert driver.returncode == 0, text
        break
    last = recipe(tmp_path)
    text = last.communicate(timeout=400)[0]
    assert last.returncode == 0, text
    assert found(tmp_path) == calm
