"""The tables of what runs under which strategy, in docs/training.md, are what ran here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.dist import bodies_run, bodies_strategies, strategies
from tests.dist.strategies import NO_COMPILER, STRATEGIES
from tests.dist.test_run import place  # noqa: F401  (a fixture)
from trainer import config as configuration
from trainer.outcome import RunError

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
MASKED = "--data.document_masking=true"
BF16 = "--train.precision=bf16"
ADAMW = ("--optim={name: adamw, lr: 0.01}", "--model.config.tie_word_embeddings=true", BF16)
SHORT = ("--train.length=3 steps", "--checkpoint.every=100 steps", "--schedule.warmup=0", "--train.micro_batch_size=1")
COLUMNS = ["Muon, NorMuon", "AdamW", "bf16", "tied weights", "accumulation", "bit-equal resume", "to and from others"]
# What is compared with the run `adamw` of the same strategy, which masks documents.
FEATURES = {
    "checkpointing: full": ("--train.activation_checkpointing=full",),
    "checkpointing: selective": ("--train.activation_checkpointing=selective",),
    "micro_batch_size: auto": ("--train.micro_batch_size=auto",),
    "loss_chunk": ("--train.loss_chunk=5",),
    "compile": ("--train.compile=true",),
}
# A compilation takes up to half a minute, most of it under stage 3: with ORTHOGON_EVERY_CELL=1 all are made, else these.
COMPILED = [*STRATEGIES] if os.environ.get("ORTHOGON_EVERY_CELL") else ["single", "ddp", "fsdp2", "deepspeed, stage: 2"]
BIT_EQUAL = ["checkpointing: full", "checkpointing: selective"]


def refusal(place: Path, overrides: list[str]) -> RunError | None:  # noqa: F811
    """What a login node says of a configuration, before any rank or data exists."""
    try:
        configuration.load(place / "run.yaml", overrides)
    except RunError as error:
        return error
    return None


def ran(group, place: Path, strategy: str, kind: str, *more: str):  # noqa: F811
    """Three steps under a strategy, or the error that refuses them."""
    world, override = STRATEGIES[strategy]
    overrides = [f"--name=s-{''.join(filter(str.isalnum, kind))}-{strategies.file_name(strategy)}", *SHORT, *more, override]
    refused = refusal(place, overrides)
    if refused is not None:
        return refused
    path = str(place / "run.yaml")
    if "--train.compile=true" in more:
        return group(world, bodies_strategies.compiled, path, overrides, "aot_eager")[0]
    return group(world, bodies_run.train, path, overrides)[0]


@pytest.fixture(scope="module")
def outcomes(group, place):  # noqa: F811
    """Per strategy, a short run of NorMuon and one of AdamW in bf16 with tied weights and masked documents."""
    kinds = {"normuon": (), "adamw": (*ADAMW, MASKED)}
    return {
        (name, kind): ran(group, place, name, kind, *more) for name in STRATEGIES for kind, more in kinds.items()
    }


@pytest.fixture(scope="module")
def features(group, place):  # noqa: F811
    """Per strategy, the run of AdamW again, with each of the features; compiled with the loss in chunks at once."""
    found = {}
    for name in STRATEGIES:
        compiled = name in COMPILED and not NO_COMPILER
        for kind, more in FEATURES.items():
            if kind == "compile" and not compiled:
                continue
            if kind == "compile" and word(found[name, "loss_chunk"]) == "ran":
                found[name, kind] = found[name, "loss_chunk"]
                continue
            together = FEATURES["compile"] if kind == "loss_chunk" and compiled else ()
            found[name, kind] = ran(group, place, name, kind, *ADAMW, MASKED, *more, *together)
    return found


def word(outcome) -> str:
    return "refused" if isinstance(outcome, RunError) or "error" in outcome else "ran"


@pytest.mark.skipif(strategies.ABSENT, reason=strategies.REASON)
def test_the_table_in_the_documentation_is_what_ran(outcomes) -> None:
    moved = {name for _, _, name in (*strategies.CHAIN, *strategies.ZERO_CHAIN)}
    lines = ["| `parallel.name` | ranks | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, (world, _) in STRATEGIES.items():
        resume = "ran" if name == "fsdp2" or name in strategies.RESUMED else "not tested"
        cells = [word(outcomes[name, "normuon"]), *[word(outcomes[name, "adamw"])] * 4, resume]
        cells.append("ran" if name in moved else "not tested")
        lines.append(f"| {name} | {world} | " + " | ".join(cells) + " |")
    assert "\n".join(lines) in PAGE.read_text()


@pytest.mark.skipif(strategies.ABSENT, reason=strategies.REASON)
@pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
def test_the_table_of_features_is_what_ran(outcomes, features) -> None:
    columns = [*FEATURES, "document_masking"]
    lines = ["| `parallel.name` | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in STRATEGIES:
        cells = [word(features[name, kind]) if (name, kind) in features else "ran" for kind in FEATURES]
        lines.append(f"| {name} | " + " | ".join([*cells, word(outcomes[name, "adamw"])]) + " |")
    assert "\n".join(lines) in PAGE.read_text()


def test_all_that_ran_agree(outcomes) -> None:
    for kind, bound in (("normuon", 1e-5), ("adamw", 0.01)):
        reference = outcomes["single", kind]["loss"]
        assert len(reference) == 3
        for name in STRATEGIES:
            if word(outcomes[name, kind]) == "ran":
                assert outcomes[name, kind]["loss"] == pytest.approx(reference, rel=bound), name


def test_documents_are_masked_under_every_strategy(outcomes, group, place) -> None:  # noqa: F811
    """Initial weights are the same, so the first loss tells masked rows (4e-4 apart) from others under any strategy."""
    masked = outcomes["single", "adamw"]["loss"][0]
    assert abs(ran(group, place, "single", "unmasked", *ADAMW)["loss"][0] / masked - 1) > 3e-4
    for name in STRATEGIES:
        if word(outcomes[name, "adamw"]) == "ran":
            assert outcomes[name, "adamw"]["loss"][0] == pytest.approx(masked, rel=1e-4), name


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_changes_nothing_or_rounding_only(kind, outcomes, features) -> None:
    """Against the plain run of the same strategy. The second loss is that of the first update; AdamW turns rounding of
    gradients near zero into full steps, hence the bounds."""
    if kind == "compile" and NO_COMPILER:
        pytest.skip(NO_COMPILER)
    names = [name for name in STRATEGIES if (name, kind) in features and word(features[name, kind]) == "ran"]
    assert names
    for name in names:
        plain, found = outcomes[name, "adamw"], features[name, kind]
        if kind in BIT_EQUAL:
            assert found["tensors"] == plain["tensors"], name
            assert found["history"] == plain["history"], name
            continue
        assert found["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-6), name
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-4), name
        norms = [[r["gradient_norm"] for r in run["history"] if "loss" in r] for run in (found, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-3), name
        if kind == "compile":
            assert found["graphs"] >= 1, name
        else:
            assert found["tensors"] != plain["tensors"], name  # it did something


def test_refusals_give_the_reason_and_the_mend(outcomes, features) -> None:
    for name in strategies.ZERO:
        error = outcomes[name, "normuon"]
        assert error.what == (
            "optim.name is normuon, which works on whole matrices, and deepspeed flattens parameters into vectors"
        )
        error = features[name, "micro_batch_size: auto"]
        assert "works with fsdp2, ddp and single, not with deepspeed" in error.what
        assert error.mend == "give a number of sequences"
    for name in ("deepspeed, stage: 3", "deepspeed, stage: 3, offload"):
        assert "gathers parameters among them" in features[name, "checkpointing: selective"].what
        assert "gathers them for one call only" in features[name, "loss_chunk"].what
