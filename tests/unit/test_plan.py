"""Plans: arithmetic, refusals, cache, speed; without torch but for the footprint itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import plan_time, shapes
from launch.plan import Machine, plan
from launch.plan_memory import checkpoint_bytes, memory, stored
from launch.verbs.plan import lines
from tests.memory import Count
from tests.models import ARCHITECTURES
from trainer import config as configuration
from trainer.config import ModelConfig
from trainer.model import footprint
from trainer.model.build import architecture
from trainer.optim.plan import Stored, own, traffic, volumes
from trainer.outcome import RunError

ROOT = Path(__file__).parents[2]


def config_of(*overrides: str, model: str = "llama-7b") -> Any:
    """A run of a model in `configs/models`, in bf16 under FSDP2."""
    raw = ["--name=p", f"--runs={ROOT}/runs-of-nobody", "--train.micro_batch_size=1", "--data.sequence_length=4096"]
    base = ROOT / "configs" / "models" / f"{model}.yaml"
    text = yaml.safe_load(base.read_text())["model"]["config"]
    return configuration.load(
        ROOT / "configs" / "quickstart.yaml",
        [*raw, f"--model.config={json.dumps(text)}", "--data.tokenizer.vocab_size=32768",
         "--train.tokens_per_step=16777216", "--train.precision=bf16", "--train.length=1000 steps",
         "--parallel={name: fsdp2}", *overrides],
    )  # fmt: skip


def record_of(config: Any) -> dict[str, Any]:
    """A footprint by hand: shapes as the library makes them, activations that are stated."""
    sizes = config.model.config
    d, f, layers, v = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"], 32768

    def entry(name: str, shape: list[int], unit: int, label: str) -> dict[str, Any]:
        whole = label == "matrices" and config.optim.name != "adamw"
        state = (
            {"momentum": [shape, 4], "mean_square": [[shape[0], 1], 4]}
            if whole
            else {"exp_avg": [shape, 4], "exp_avg_sq": [shape, 4], "step": [[], 4]}
        )
        return {"name": name, "shape": shape, "label": label, "rule": "normuon" if whole else "adamw", "unit": unit,
                "whole": whole, "cut": None, "sums": 0, "transposed": False, "blocks": [], "state": state}  # fmt: skip

    parameters = [entry("embed", [v, d], -1, "embeddings"), entry("head", [v, d], -1, "embeddings")]
    for i in range(layers):
        shapes_ = [[d, d]] * 4 + [[f, d]] * 2 + [[d, f]]
        parameters += [entry(f"{i}.{n}", s, i, "matrices") for n, s in enumerate(shapes_)]
        parameters += [entry(f"{i}.norm{n}", [d], i, "vectors") for n in range(2)]
    parameters.append(entry("norm", [d], -1, "vectors"))
    count = sum(math.prod(p["shape"]) for p in parameters)
    kept = {"none": 20, "full": 1, "selective": 10}[config.train.activation_checkpointing] * 2**30
    return {"model_type": "llama", "vocabulary": v, "parameters": parameters, "buffers": 0, "units": layers,
            "polar_steps": 5, "flops_per_token": 6 * count, "why": "",
            "activations": {"kept": [0, kept], "peak": [0, kept + 2**30]}}  # fmt: skip


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_fast_volumes_are_those_of_the_slow_count(data) -> None:
    dim = data.draw(st.sampled_from([None, 0, 1, 2]))
    parts = data.draw(st.integers(1, 7)) if dim is not None else 1
    size, parameters = st.integers(1, 12), []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = (data.draw(size) if dim == 0 else 1, data.draw(size), data.draw(size))
        cut = data.draw(st.integers(0, shape[1] - 1))
        parameters.append(Stored(shape, dim, (cut, shape[1] - cut) if cut else ()))
    matrices = own(parameters, parts)
    assert volumes(parameters, matrices, parts, 1, 2) == traffic(parameters, matrices, parts, 2)


def test_replicas_pass_on_what_they_made() -> None:
    parameters = [Stored((1, 4, 6), None), Stored((1, 4, 6), None)]
    assert volumes(parameters, own(parameters, 1, 2), 1, 2, 4) == [(96, 96), (96, 96)]
    sent = volumes(parameters, own(parameters, 1, 3), 1, 3, 4)
    assert sorted(sent) == [(0, 192), (192, 96), (192, 96)]


@pytest.mark.parametrize("name", ["llama", "gemma, tied", "gpt2, tied", "mistral"])
def test_activations_without_storage_are_those_with_it(name, monkeypatch) -> None:
    """Every byte: fake tensors against real ones, in the same count."""
    given = ModelConfig(config=ARCHITECTURES[name])
    shape = architecture(given, vocab_size=301, bos=0, eos=1, max_length=16)
    for mode in ("none", "selective") if name == "llama" else ("none",):
        config = config_of(f"--train.activation_checkpointing={mode}", "--data.sequence_length=16",
                           "--train.tokens_per_step=1024", "--train.precision=fp32")  # fmt: skip
        fake = footprint.lived(config, shape, 2)
        with monkeypatch.context() as patch:
            patch.setattr(footprint, "FakeTensorMode", nullcontext)
            patch.setattr(footprint, "_unpacked", lambda whole: nullcontext())
            patch.setattr(footprint, "Living", Count)
            assert footprint.lived(config, shape, 2) == fake


def test_what_cannot_be_counted_is_said(monkeypatch) -> None:
    config = config_of(model="llama-60m")
    monkeypatch.setattr(footprint, "lived", lambda *_: (_ for _ in ()).throw(RuntimeError("no fake form")))
    assert footprint.activations(config, None) == (None, "RuntimeError: no fake form")
    record = record_of(config) | {"activations": None, "why": "no fake form"}
    found = plan(config, Machine(per_node=8, gpu="h100"), lambda _: record)
    assert any("activations are not known" in line for line in lines(found))


@pytest.mark.parametrize("world", [1, 8, 512, 4096])
def test_every_size_of_cluster_in_a_blink(world) -> None:
    config = config_of("--train.micro_batch_size=1", "--train.activation_checkpointing=full")
    record = record_of(config)
    machine = Machine(nodes=max(1, world // 8), per_node=min(8, world), gpu="b200", time_limit=24 * 3600.0)
    began = time.process_time()
    found = plan(config, machine, lambda _: record)
    assert time.process_time() - began < 1.0
    weights = 4 * sum(math.prod(p["shape"]) for p in record["parameters"])
    held = found["memory"]["bytes"]
    assert weights / world <= held["weights"] <= weights / world * 1.06  # 11,008 rows over 4,096 ranks: 3 each
    assert found["time"]["gpu hours"] == pytest.approx(found["time"]["hours"] * world)
    assert found["disk"]["checkpoint"] == checkpoint_bytes(record)
    assert json.loads(json.dumps(found)) == found
    assert "\n".join(lines(found)).count("\n") > 15


def test_bad_plans_are_refused_with_what_would_help() -> None:
    config = config_of(model="llama-60m")

    def refused(machine: Machine, *overrides: str) -> RunError:
        changed = config_of(*overrides, model="llama-60m")
        with pytest.raises(RunError) as error:
            plan(changed, machine, record_of)
        return error.value

    assert "does not divide" in refused(Machine(per_node=3, gpu="h100"), "--parallel={name: fsdp2, replicate: 2}").what
    assert "ranks share a step" in refused(Machine(per_node=8, gpu="h100"), "--train.tokens_per_step=4096").what
    assert refused(Machine(gpu="h10")).mend.startswith("did you mean")
    assert "8192 ranks" in refused(Machine(nodes=1024, per_node=8, gpu="h100")).what
    assert "no share" in refused(Machine(gpu="h100", mfu=40)).what
    assert "leaves nothing" in refused(Machine(gpu="h100", time_limit=100.0)).what
    short = refused(Machine(per_node=8, gpu="l4"))
    assert "too much" in short.what
    assert "activation_checkpointing: full" in short.mend
    need = memory(config, record_of(config), 8, 1, 512, 2)["total"]
    assert f"{need / 1e9:.1f} GB" in short.what


def test_automatic_micro_batches_shrink_until_they_fit() -> None:
    config = config_of("--train.micro_batch_size=auto", "--train.tokens_per_step=262144", model="llama-60m")
    found = plan(config, Machine(per_node=8, gpu="h100"), record_of)
    assert (found["step"]["rows"], found["step"]["micro steps"]) == (2, 4)


def test_save_intervals_and_requeues() -> None:
    assert plan_time.save_interval(10, 86400) == pytest.approx(math.sqrt(2 * 10 * 86400), rel=0.01)
    assert plan_time.save_interval(100, 40) == 40
    best = plan_time.save_interval(60, 3600)
    losses = [plan_time.lost_share(60, best * factor, 3600) for factor in (0.5, 1.0, 2.0)]
    assert losses[1] == min(losses)
    assert plan_time.requeues(3600, 7200, 10, 60) == 0
    assert plan_time.requeues(7200, 3600 + 190, 10, 60) == 1
    assert plan_time.requeues(10, 100, 10, 60) is None


def test_stored_matrices_of_transposed_and_stacked_weights() -> None:
    common = {"whole": True, "blocks": []}
    entries = [{"shape": [3, 5], "transposed": True, **common}, {"shape": [2, 3, 5], "transposed": True, **common}]
    assert stored(entries, True) == [Stored((1, 5, 3), 2), Stored((2, 5, 3), 0)]
    assert stored(entries, False)[0].dim is None


def test_the_footprint_is_asked_for_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(shapes.torchrun, "answer", lambda *a, **k: asked.append(a) or {"x": 1})
    config = config_of(model="llama-60m")
    assert shapes.shapes(config) == shapes.shapes(config) == {"x": 1}
    assert len(asked) == 1
    shapes.shapes(config_of("--resources.ranks=7", "--train.length=5 steps", model="llama-60m"))
    assert len(asked) == 1
    shapes.shapes(config_of("--train.loss_chunk=512", model="llama-60m"))
    assert len(asked) == 2
    next((tmp_path / "orthogon" / "shapes").iterdir()).write_text("{")
    shapes.shapes(config)
    shapes.shapes(config_of("--train.loss_chunk=512", model="llama-60m"))
    assert len(asked) == 3  # a torn file is made again
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert shapes.shapes(config) == {"x": 1}


def test_the_command_line(tmp_path) -> None:
    words = [sys.executable, "-m", "launch.cli", "plan", "configs/quickstart.yaml", "--train.length=2 epochs", "--json"]
    words += ["--train.micro_batch_size=1", "--data.sequence_length=32", "--gpus-per-node=2", "--gpu=a100"]
    words += ["--model.config.num_hidden_layers=1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["time"]["steps"] is None
    assert found["time"]["hours per billion tokens"] > 0
    assert found["memory"]["bytes"]["activations"] > 0
    done = subprocess.run(
        [*words[:-4], "--gpu=a1000", "--gpus-per-node=2"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, "did you mean a100" in done.stderr) == (78, True)


def test_a_run_that_was_gives_its_own_figures(tmp_path) -> None:
    folder = tmp_path / "r"
    assert plan_time.measured(folder) == plan_time.Measured(None, None)
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "events.jsonl").write_text('{"event": "saved", "seconds": 2.5}\n{"event": "saved", "seconds": 3.5}\n')
    assert plan_time.measured(folder) == plan_time.Measured(None, 3.5)
