"""The profiler traces the steps that were asked for, and nothing by default."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from trainer.metrics.options import MetricsConfig
from trainer.metrics.trace import Trace
from trainer.outcome import RunError

CPU = torch.device("cpu")


def steps(trace: Trace, last: int) -> None:
    """Step k adds k numbers of shape (k,)."""
    for step in range(1, last + 1):
        trace.at(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(step).add(1)


def traced(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::add" for event in events)
    return {event["name"] for event in events if event.get("name", "").startswith("step ")}


@pytest.mark.parametrize(
    ("window", "last", "seen"), [((3, 2), 6, {"step 3", "step 4"}), ((5, 9), 6, {"step 5", "step 6"})]
)
def test_the_window_is_traced_and_a_run_that_ends_inside_it_too(tmp_path, window, last, seen) -> None:
    told: list[str] = []
    trace = Trace(MetricsConfig(profile=window), tmp_path / "profile/1", 1, CPU, told.append)
    steps(trace, last)
    trace.close()
    trace.close()
    assert traced(tmp_path / "profile/1/rank-1.json.gz") == seen
    assert len(told) == 1
    assert "rank-1.json.gz" in told[0]


def test_nothing_is_traced_by_default_or_after_the_window(tmp_path) -> None:
    for config, last in ((MetricsConfig(), 3), (MetricsConfig(profile=(9, 2)), 3)):
        trace = Trace(config, tmp_path / "profile", 0, CPU, pytest.fail)
        steps(trace, last)
        trace.close()
    trace = Trace(MetricsConfig(profile=(2, 2)), tmp_path / "profile", 0, CPU, pytest.fail)
    trace.at(4)
    trace.close()
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path) -> None:
    (tmp_path / "profile").write_text("in the way")
    told: list[str] = []
    trace = Trace(MetricsConfig(profile=(1, 1)), tmp_path / "profile", 0, CPU, told.append)
    steps(trace, 3)
    assert len(told) == 1
    assert "cannot be written" in told[0]
    trace = Trace(MetricsConfig(profile=(1, 1)), tmp_path / "other", 0, CPU, told.append)  # the profiler is free again
    steps(trace, 3)
    assert traced(tmp_path / "other/rank-0.json.gz") == {"step 1"}


def test_a_memory_snapshot_on_the_cpu_is_refused_with_the_reason(tmp_path) -> None:
    with pytest.raises(RunError) as caught:
        Trace(MetricsConfig(memory_snapshot=(1, 1)), tmp_path, 0, CPU, print)
    assert "CUDA's allocator" in caught.value.what
    assert caught.value.mend
