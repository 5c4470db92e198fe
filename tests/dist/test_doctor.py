"""`orthogon doctor` as a whole, and the sum of its ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from trainer import probe


def summed(wrong_rank: int) -> dict[str, Any]:
    """What a rank measures, when one of them starts from a wrong number."""
    true = torch.full
    if dist.get_rank() == wrong_rank:
        torch.full = lambda size, value, **more: true(size, value + 1, **more)  # type: ignore[assignment]
    try:
        return probe.all_reduce(torch.device("cpu"))
    finally:
        torch.full = true


def test_a_wrong_sum_is_seen_by_all(group) -> None:
    assert [fact["right"] for fact in group(2, summed, -1)] == [True, True]
    assert [fact["right"] for fact in group(2, summed, 1)] == [False, False]


def test_a_machine_is_examined(tmp_path) -> None:
    line = [sys.executable, "-m", "launch.cli", "doctor", "--json", "--ranks=2", f"--runs={tmp_path}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=280)
    found = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    assert found["torch"]["result"] == "ok", done.stderr
    assert found["all-reduce"]["result"] == "ok"
    assert "right sum" in found["all-reduce"]["detail"]
    assert "compiler" in found
