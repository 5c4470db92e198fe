"""What only a CUDA device can show of the traces."""

from __future__ import annotations

import pickle

import pytest
import torch

from trainer.metrics.options import MetricsConfig
from trainer.metrics.trace import Trace


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_memory_snapshot_holds_the_allocations_of_its_steps(tmp_path) -> None:
    device = torch.device("cuda", 0)
    trace = Trace(MetricsConfig(profile=(2, 1), memory_snapshot=(2, 1)), tmp_path, 0, device, print)
    sizes = (1 << 20, 3 << 20, 5 << 20)
    for step, size in enumerate(sizes, start=1):
        trace.at(step)
        torch.empty(size, dtype=torch.uint8, device=device)
    trace.close()
    snapshot = pickle.loads((tmp_path / "rank-0-memory.pickle").read_bytes())
    allocated = [
        event["size"] for events in snapshot["device_traces"] for event in events if event["action"] == "alloc"
    ]
    assert sizes[1] in allocated
    assert sizes[2] not in allocated
    assert (tmp_path / "rank-0.json.gz").stat().st_size > 0
