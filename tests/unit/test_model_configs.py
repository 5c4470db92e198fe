"""The shapes of configs/models: as large as they say, built on the meta device, usable below a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer import config as configuration
from trainer.model.build import architecture, blocks, build, parameter_count
from trainer.model.flops import flops_per_token

FOLDER = Path(__file__).parents[2] / "configs" / "models"
NOMINAL = {"60m": 60e6, "150m": 150e6, "300m": 300e6, "600m": 600e6, "1.4b": 1.4e9, "3b": 3e9, "7b": 6.74e9}
RUN = """\
base: {base}
name: mine
data: {{path: stdlib}}
train: {{length: 10 steps, tokens_per_step: 8192}}
optim: {{name: normuon}}
parallel: {{name: fsdp2}}
"""


def test_there_is_a_file_for_every_size() -> None:
    assert {path.stem.removeprefix("llama-") for path in FOLDER.glob("*.yaml")} == set(NOMINAL)


@pytest.mark.parametrize("size", NOMINAL)
def test_a_shape_has_the_size_that_it_says(size, tmp_path) -> None:
    path = FOLDER / f"llama-{size}.yaml"
    (tmp_path / "run.yaml").write_text(RUN.format(base=path))
    config = configuration.load(tmp_path / "run.yaml")
    said = re.search(
        r"Llama of ([\d.]+)([MB]) parameters at a vocabulary of ([\d,]+): ([\d.]+)([MB])", path.read_text()
    )
    assert said is not None
    total, body = (float(said[i]) * {"M": 1e6, "B": 1e9}[said[i + 1]] for i in (1, 4))
    vocabulary = int(said[3].replace(",", ""))
    model = build(architecture(config.model, vocab_size=vocabulary, bos=0, eos=1, max_length=1024))
    assert parameter_count(model) == pytest.approx(total, rel=0.002)
    assert parameter_count(model.model.layers) == pytest.approx(body, rel=0.002)
    assert parameter_count(model) == pytest.approx(NOMINAL[size], rel=0.03)
    assert len(blocks(model)) == config.model.config["num_hidden_layers"]
    assert flops_per_token(model, 1024) > 6 * body
