from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from launch import children
from tests.chaos import harness


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails leaves no run behind."""
    yield
    for process in harness.started:
        if process.poll() is None:
            for pid in [process.pid, *children.descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
    harness.started.clear()
