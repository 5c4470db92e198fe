"""Losses of a small run of every optimizer, kept in a file: a change that moves them must change the file, too.

`ORTHOGON_WRITE_GOLDEN=1 pytest tests/dist/test_golden.py` writes it. Equal to the bit on the kind of CPU that wrote it;
elsewhere, where products round otherwise, to the tolerances below.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from tests.dist import bodies_run
from tests.dist.test_run import place  # noqa: F401  (a fixture)
from trainer import registry

FILE = Path(__file__).parent / "golden.json"
TOLERANCE = 5e-4
CHOOSES = {"dct_adamw": (20, 1e-2)}
"""Rules whose choices (of columns) last bits can turn: so many steps are within `TOLERANCE`, the others within another one."""
STEPS = 60
OPTIMIZERS = sorted(registry.alternatives("trainer.optim"))


def here() -> str:
    """What the last bits depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))]
    return f"{platform.machine()} torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {hash_of(models[:2])}"


def hash_of(lines: list[str]) -> str:
    from trainer.files import digest

    return digest(lines)[:12]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_are_those_of_the_file(group, place, name) -> None:  # noqa: F811
    overrides = [f"--name=golden-{name}", f"--train.length={STEPS} steps", "--evaluate.every=1000 steps", "--checkpoint.every=1000 steps"]
    exact = ", polar_dtype: fp32" if hasattr(registry.alternatives("trainer.optim")[name].Options, "polar_dtype") else ""
    optimizer = "{name: " + name + ", lr: 0.01" + exact + "}"
    losses = group(2, bodies_run.train, str(place / "run.yaml"), [*overrides, f"--optim={optimizer}"])[0]["loss"]
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("ORTHOGON_WRITE_GOLDEN"):
        FILE.write_text(json.dumps({**kept, name: {"cpu": here(), "losses": losses}}, indent=0) + "\n")
        return
    alike, tolerance = CHOOSES.get(name, (STEPS, TOLERANCE))
    assert losses[:alike] == pytest.approx(kept[name]["losses"][:alike], rel=TOLERANCE)
    assert losses == pytest.approx(kept[name]["losses"], rel=tolerance)
    if kept[name]["cpu"] == here():
        assert losses == kept[name]["losses"]
