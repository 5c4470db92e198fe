from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.group import Groups


@pytest.fixture(scope="session")
def group() -> Iterator[Groups]:
    """`group(world, function, *arguments)` runs a module-level function on `world` gloo ranks."""
    groups = Groups()
    yield groups
    groups.close()
