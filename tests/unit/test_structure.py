"""Directions of imports, no cycles, and no torch where it must not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for folder in ("trainer", "launch")
    for p in sorted((ROOT / folder).rglob("*.py"))
}
# What the launcher may use of the trainer: files and pure functions that load no torch.
SHARED = {
    "config", "config_data", "data.mixture", "outcome", "runfolder", "yaml_source", "schedule", "derive", "checkpoint.manifest", "metrics.history",
    "optim.decay", "optim.plan", "optim.sides", "units", "model.peaks", "registry", "guard.heartbeat", "guard.faults", "lock", "files", "checkpoint.contents", "ensemble.manifest",
    "ensemble.recipe", "environment",
}  # fmt: skip

LAUNCH_VERBS = [name for name in FILES if name.startswith("launch.verbs")]


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {name for name in found if name in FILES and name != module}
    return {name for name in inside if not any(other.startswith(name + ".") for other in inside)}


def test_launch_uses_only_the_shared_part_of_the_trainer_and_never_the_reverse() -> None:
    for module in FILES:
        for other in imports(module):
            if module.startswith("launch"):
                assert not other.startswith("trainer.") or other.removeprefix("trainer.") in SHARED, (module, other)
            else:
                assert not other.startswith("launch"), (module, other)


def test_no_import_cycles() -> None:
    graph = {module: imports(module) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "module",
    [
        "launch.cli",
        "launch.backends.torchrun",
        "launch.backends.slurm",
        "launch.slurm.job",
        "launch.slurm.node",
        "trainer.environment",
        "launch.supervisor",
        "launch.report",
        "launch.recipes.stages",
        "launch.recipes.results",
        "launch.recipes.page",
        "launch.tuning",
        "launch.distilling",
        *LAUNCH_VERBS,
        *(f"trainer.{name}" for name in sorted(SHARED)),
        "trainer.optim",
    ],
)
def test_light_modules_load_no_torch(module) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_files_stay_small_and_finished() -> None:
    for module, path in FILES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, module
        assert "NotImplementedError" not in text, module
