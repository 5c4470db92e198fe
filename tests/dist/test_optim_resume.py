"""T22. State saved on four ranks goes on at two, three and one, in other layouts, as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist import bodies_optim, bodies_resume
from tests.dist.test_battery import OPTIONS, RULES, assert_same

FUSED = {"blocks": [8, 4, 6], "transposed": True}
CASES: list[tuple[str, dict[str, Any], torch.dtype, list[Any]]] = [
    *((rule, {}, torch.float32, bodies_optim.SHAPES) for rule in RULES),
    *((rule, {}, torch.bfloat16, [(20, 12), (7, 9), (4, 6, 10)]) for rule in RULES),
    ("muon", {"nesterov": True, **FUSED}, torch.float32, [(18, 10), (18, 7), (2, 18, 6)]),
    ("normuon", {"axis": "longer", "restore": "norm"}, torch.float32, bodies_optim.SHAPES),
    ("normuon", FUSED, torch.bfloat16, [(18, 10), (18, 7), (2, 18, 6)]),
    ("dct_adamw", {"refresh": 2, "error_feedback": "fp32", **FUSED}, torch.float32, [(18, 10), (18, 3), (2, 18, 4)]),
    ("trion", FUSED, torch.float32, [(18, 10), (18, 3), (2, 18, 4)]),
]
WIDE = {"exp_avg", "exp_avg_sq", "step", "momentum", "mean_square", "feedback", "feedback_range"}


@pytest.mark.parametrize("rule, change, dtype, shapes", CASES)
def test_saved_on_four_ranks_goes_on_at_2_3_and_1(rule, change, dtype, shapes, group, tmp_path) -> None:
    options = {**OPTIONS, **change}
    undisturbed = {n: group(1, bodies_optim.steps, rule, "plain", options, n, dtype, shapes)[0] for n in (3, 5)}
    names = group(4, bodies_resume.train_and_save, str(tmp_path), rule, "shard0", options, 3, dtype, shapes)
    assert all(of_rank == names[0] for of_rank in names)  # no rank knows a tensor that another does not
    for world, layout in ((2, "shard0"), (3, "shard1"), (1, "plain"), (4, "hsdp0-spread")):
        results = group(world, bodies_resume.load_and_train, str(tmp_path), rule, layout, options, 5, dtype, shapes)
        for saved_on, loaded, after in results:
            assert saved_on == 4
            for name, value in loaded.items():
                wide = torch.float32 if name.rpartition(".")[2] in WIDE else dtype
                assert value.dtype == (wide if value.is_floating_point() else torch.int64), name
            assert_same(rule, undisturbed[3], loaded, 2.0**-7)
            assert_same(rule, undisturbed[5], after, 2.0**-7)
    for name, value in undisturbed[5].items():  # two more steps are to be seen in every tensor, but in choices and ages
        assert not value.is_floating_point() or not torch.equal(value, undisturbed[3][name]), name
