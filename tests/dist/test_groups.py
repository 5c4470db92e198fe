"""Figures of parameter groups are those of the whole tensors, on any number of ranks and in any layout."""

from __future__ import annotations

import pytest

from tests.dist import bodies_metrics

LAYOUTS = [(1, "plain"), (1, "shard0"), (2, "plain"), (2, "shard0"), (2, "replicate"), (3, "shard0"), (3, "shard1"), (4, "hsdp0")]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_figures_are_those_of_whole_tensors(group, world, layout) -> None:
    for found, expected in group(world, bodies_metrics.measured, layout, 0.5):
        assert list(found) == ["matrices", "matrices-2", "vectors"]
        for name, figures in expected.items():
            for key, value in figures.items():
                assert found[name][key] == pytest.approx(value, rel=1e-6), (name, key)
        assert found["matrices"]["learning_rate"] == 0.02
        assert found["matrices"]["tau_epochs"] == pytest.approx(1 / (0.02 * 0.1 * 50))
        assert found["vectors"]["tau_epochs"] is None
