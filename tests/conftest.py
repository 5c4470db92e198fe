"""What all tests share: no test writes into the state folder of the user who runs it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_state_folder() -> Iterator[None]:
    before, folder = os.environ.get("ORTHOGON_STATE"), tempfile.mkdtemp(prefix="orthogon-state-")
    os.environ["ORTHOGON_STATE"] = folder
    yield
    if before is None:
        del os.environ["ORTHOGON_STATE"]
    else:
        os.environ["ORTHOGON_STATE"] = before
    shutil.rmtree(folder, ignore_errors=True)
