"""A whole recipe of tiny runs through torchrun: every stage, a kill in the middle, the same command again, the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.test_cli import ROOT
from trainer import config as configuration

RUN = """\
name: t
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, tie_word_embeddings: false}}
data: {tokenizer: {vocab_size: 300}, sequence_length: 64, subset_tokens: 4096, documents: line, validation_fraction: 0.1, test_fraction: 0.1}
train: {length: 1 epochs, tokens_per_step: 512, micro_batch_size: 8}
optim: {name: adamw, lr: 0.003, decay_head: true}
parallel: {name: single}
checkpoint: {every: 100000 steps, keep: 1}
evaluate: {every: 100000 steps, sequences: 16}
resources: {ranks: 1, device: cpu}
finish: {export: false}
"""
RECIPE = """\
name: tiny
config: run.yaml
sizes: {base: {}}
standard: {epochs: [1], lr: [0.003], weight_decay: 0.1}
regularized: {epochs: [1], lr: [0.003], weight_decay: [0.8], start: [1, 0.003, 0.8], most_epochs: 1, most_lr: 0.003, most_runs: 1}
members: {half: {count: 2, weight_decay: 0.5}}
students: {text: {teacher: half, kind: text, share: 1/2, tokens: 4k}, synthetic: {teacher: half, kind: synthetic, share: 1/2, tokens: 4k},
           logits: {teacher: half, kind: logits, form: hidden}}
tasks: [words.jsonl]
inequalities: true
"""


def recipe(folder: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "launch.cli", "recipe", "run", "recipe.yaml", "--at-once=2", "--data.path=text.txt", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def write_files(folder: Path) -> None:
    """A text, questions, the configuration and the recipe."""
    words = [f"the {a} of the {b} is {c}" for a in ("cat", "dog", "end") for b in ("sea", "hill", "year") for c in range(150)]
    (folder / "text.txt").write_text("\n".join(words))
    (folder / "run.yaml").write_text(RUN)
    (folder / "recipe.yaml").write_text(RECIPE)
    questions = [{"query": f"the {a} of the", "choices": [" sea", " is"], "gold": 0} for a in ("cat", "dog", "end")]
    (folder / "words.jsonl").write_text("\n".join(json.dumps(question) for question in questions))


@pytest.mark.timeout(600)
def test_a_recipe_is_interrupted_and_goes_on_to_its_report(tmp_path) -> None:
    write_files(tmp_path)
    stopped = recipe(tmp_path, "--budget=1e3")
    text = stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 75, text
    assert "standard of tiny-base needs" in text
    assert not (tmp_path / "runs" / "tiny-base-std-e1-lr0.003-wd0.1").exists()
    first = recipe(tmp_path)
    kept = tmp_path / "runs" / "tiny-base-e1-lr0.003-wd0.8"
    patience = time.monotonic() + 200
    while not kept.exists() and time.monotonic() < patience:
        time.sleep(0.2)
    assert kept.exists()
    os.kill(first.pid, signal.SIGKILL)  # its runs go on without it
    first.wait()
    second = recipe(tmp_path)
    text = second.communicate(timeout=400)[0]
    assert second.returncode == 0, text
    assert "tiny-base-std-e1-lr0.003-wd0.1: started" not in text
    results = json.loads((tmp_path / "runs/recipes/tiny/results.json").read_text())
    stages = {run["stage"] for run in results["runs"].values()}
    assert stages == {"standard", "regularized", "members half", "student text", "student synthetic", "student logits"}
    assert all(run["loss"] > 1 and run["train_loss"] > 1 for run in results["runs"].values())
    assert results["split"] == "test"
    (half,) = results["ensembles"].values()
    one, both = half["curves"]["logit mean"]
    assert both["loss"] < one["loss"]
    assert one["loss"] == pytest.approx(sum(results["runs"][run]["loss"] for run in half["members"]) / 2, abs=1e-6)
    real, alone = (configuration.load(tmp_path / f"runs/tiny-{name}-0/config.yaml").data for name in ("text", "synthetic"))
    assert alone.mixture["synthetic"].table == real.mixture["synthetic"].table  # one pool for both
    assert half["tasks"]["words"]["ensemble"]["questions"] == 3
    page = (tmp_path / "runs/recipes/tiny/report.md").read_text()
    assert all(name in page for name in results["runs"])
    assert (tmp_path / "runs/recipes/tiny/figures.png").stat().st_size > 10_000
