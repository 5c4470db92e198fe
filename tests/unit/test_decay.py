"""Weight decay as a time: what it is in weight, where it is refused, and the line that tells what decays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainer import config as configuration
from trainer.optim import decay
from trainer.outcome import RunError
from trainer.registry import alternatives

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
RULES = alternatives("trainer.optim")


@pytest.mark.parametrize("rule", RULES)
def test_a_timescale_is_one_over_the_decay_of_an_epoch_for_every_rule(rule) -> None:
    options = replace(RULES[rule].Options(), lr=3e-3, tau_epochs=0.26)
    if hasattr(options, "adamw"):
        options = replace(options, adamw=replace(options.adamw, lr=1e-3, tau_epochs=0.39, decay_head=True))
    found = decay.settled(options, 800.0)
    assert found.weight_decay == pytest.approx(1.6, rel=3e-3), (
        "the tuned 150M and 300M of arXiv 2509.14786 at 200M tokens"
    )
    assert decay.tau_epochs(found.lr, found.weight_decay, 800.0) == pytest.approx(0.26)
    assert found.tau_epochs is None
    if hasattr(options, "adamw"):
        assert found.adamw.weight_decay == pytest.approx(3.2, rel=3e-3)
        assert found.adamw.tau_epochs is None
    plain = replace(RULES[rule].Options(), weight_decay=0.1)
    assert decay.settled(plain, 800.0) == plain


def test_a_timescale_of_a_step_or_less_is_refused() -> None:
    options = replace(RULES["adamw"].Options(), tau_epochs=0.01)
    with pytest.raises(RunError, match="optim.tau_epochs = 0.01 is 0.9 steps"):
        decay.settled(options, 90.0)
    assert decay.settled(options, 110.0).weight_decay * options.lr == pytest.approx(1 / 1.1)


WRONG = [
    (["--optim.tau_epochs=0.3"], "optim.tau_epochs = 0.3 and optim.weight_decay = 0.1 both set the decay"),
    (["--optim.tau_epochs=0.3", "--optim.weight_decay=0", "--optim.lr=0"], "needs a rate, and optim.lr is 0"),
    (["--optim.adamw.tau_epochs=0.3"], "optim.adamw.tau_epochs does nothing"),
    (["--optim.tau_epochs=0", "--optim.weight_decay=0"], "optim.tau_epochs: input should be greater than 0"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_what_cannot_be_is_told_with_its_place(options, words) -> None:
    with pytest.raises(RunError) as error:
        configuration.load(QUICKSTART, options)
    assert words in error.value.what
    assert error.value.where == f"command line, --{next(o for o in options if 'tau' in o)[2:].partition('=')[0]}"


def test_a_resume_may_change_it() -> None:
    old, new = (
        configuration.resolved(configuration.load(QUICKSTART, ["--optim.weight_decay=0", f"--optim.tau_epochs={tau}"]))
        for tau in (0.3, 0.6)
    )
    assert configuration.check_resume(old, new) == {"optim.tau_epochs": (0.3, 0.6)}


def test_the_line_tells_what_decays_and_what_does_not() -> None:
    groups = [
        {"initial_lr": 0.01, "weight_decay": 0.1}, {"initial_lr": 0.01, "weight_decay": 0.0},
        {"initial_lr": 0.02, "weight_decay": 0.1}, {"initial_lr": 0.01, "weight_decay": 0.0},
    ]  # fmt: skip
    names, sizes = ["matrices", "embeddings", "head", "vectors"], [(21, 1200000), (1, 5000), (1, 6000), (9, 400)]
    assert decay.summary(groups, names, sizes, 312.5) == (
        "matrices 0.1 (21 tensors, 1,200,000 parameters, tau 3.2 epochs); head 0.1 (1 tensor, 6,000 parameters, tau 1.6 epochs); "
        "none: embeddings, vectors (10 tensors, 5,400 parameters)"
    )
