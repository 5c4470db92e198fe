"""The table of what runs under which strategy, in docs/training.md, is what ran here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import strategies
from tests.dist.strategies import STRATEGIES
from tests.dist.test_run import place, resumed  # noqa: F401  (place is a fixture)
from trainer import config as configuration
from trainer.outcome import RunError

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
ADAMW = ("--optim={name: adamw, lr: 0.01}", "--train.precision=bf16", "--model.config.tie_word_embeddings=true")
SHORT = ("--train.length=3 steps", "--checkpoint.every=100 steps", "--schedule.warmup=0", "--train.micro_batch_size=1")
COLUMNS = ["Muon, NorMuon", "AdamW", "bf16", "tied weights", "accumulation", "bit-equal resume", "to and from others"]


@pytest.fixture(scope="module")
def outcomes(group, place):  # noqa: F811
    """Per strategy, the losses of a short run of NorMuon and of one of AdamW in bf16 with tied weights, or the refusal."""
    found = {}
    for name, (world, override) in STRATEGIES.items():
        for kind, more in (("normuon", ()), ("adamw", ADAMW)):
            overrides = (*SHORT, *more, override)
            try:
                configuration.load(place / "run.yaml", list(overrides))
            except RunError as error:
                found[name, kind] = error.what
                continue
            run = resumed(group, place, f"s-{kind}-{strategies.file_name(name)}", [(world, None)], *overrides)[0]
            found[name, kind] = run.get("error") or run["loss"]
    return found


@pytest.mark.skipif(strategies.ABSENT, reason=strategies.REASON)
def test_the_table_in_the_documentation_is_what_ran(outcomes) -> None:
    moved = {name for _, _, name in (*strategies.CHAIN, *strategies.ZERO_CHAIN)}
    lines = ["| `parallel.name` | ranks | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, (world, _) in STRATEGIES.items():
        ran = {kind: "ran" if isinstance(outcomes[name, kind], list) else "refused" for kind in ("normuon", "adamw")}
        resume = "ran" if name == "fsdp2" or name in strategies.RESUMED else "not tested"
        cells = [ran["normuon"], *[ran["adamw"]] * 4, resume, "ran" if name in moved else "not tested"]
        lines.append(f"| {name} | {world} | " + " | ".join(cells) + " |")
    assert "\n".join(lines) in PAGE.read_text()


def test_all_that_ran_agree(outcomes) -> None:
    for kind, bound in (("normuon", 1e-5), ("adamw", 0.01)):
        reference = outcomes["single", kind]
        assert len(reference) == 3
        for name in STRATEGIES:
            if isinstance(outcomes[name, kind], list):
                assert outcomes[name, kind] == pytest.approx(reference, rel=bound), name


def test_the_refusal_gives_the_reason(outcomes) -> None:
    assert {outcomes[name, "normuon"] for name in strategies.ZERO} == {
        "optim.name is normuon, which works on whole matrices, and deepspeed flattens parameters into vectors"
    }
