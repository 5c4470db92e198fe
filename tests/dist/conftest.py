from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.dist import bodies_run
from tests.dist.group import Groups


@pytest.fixture(scope="session")
def group() -> Iterator[Groups]:
    """`group(world, function, *arguments)` runs a module-level function on `world` gloo ranks."""
    groups = Groups()
    yield groups
    groups.close()


@dataclass(frozen=True)
class Tiny:
    """A finished run that tests share and must not change: two ranks, 20 steps, saved and validated every 5, sampled."""

    place: Path
    result: dict[str, Any]

    @property
    def yaml(self) -> str:
        return str(self.place / "run.yaml")

    @property
    def folder(self) -> Path:
        return self.place / "runs/tiny"

    @property
    def runs(self) -> str:
        return f"--runs={self.place}/runs"


TINY = """\
name: tiny
runs: {folder}/runs
model:
  config: {{model_type: llama, hidden_size: 24, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 3,
           num_key_value_heads: 3}}
data: {{path: "{folder}/corpus.txt", folder: "{folder}/prepared", documents: paragraph, validation_fraction: 0.2,
        tokenizer: {{vocab_size: 301}}, sequence_length: 16}}
train: {{length: 20 steps, tokens_per_step: 128, micro_batch_size: 2}}
optim: {{name: normuon, lr: 0.01, polar_dtype: fp32}}
schedule: {{name: wsd, warmup: 0.1, decay: 0.3}}
parallel: {{name: fsdp2, reshard_after_forward: false}}
checkpoint: {{every: 5 steps, keep: 4}}
evaluate: {{every: 5 steps, tokens: 6, prompts: ["the sea", "of"]}}
resources: {{device: cpu, ranks: 2}}
"""


def calm_run(folder: Path, ranks: int = 2) -> str:
    """The file of the tiny run without validation and samples, saved every 4 steps, on a text that is written here."""
    lines = [f"Line {i} tells of {i * i} things, of {i % 7} days and of {i % 5} seas." for i in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(lines))
    calm = TINY.replace('evaluate: {{every: 5 steps, tokens: 6, prompts: ["the sea", "of"]}}', "evaluate: {{every: 1000 steps}}")
    return calm.format(folder=folder).replace("ranks: 2", f"ranks: {ranks}").replace("every: 5 steps", "every: 4 steps")


@pytest.fixture(scope="session")
def tiny(group: Groups, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    place = tmp_path_factory.mktemp("tiny")
    words = "the of sea light runs over under seven stones while green birds sing and nobody hears it".split()
    lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + f" {i}." for i in range(40)]
    (place / "corpus.txt").write_text("\n\n".join(lines))
    (place / "run.yaml").write_text(TINY.format(folder=place))
    return Tiny(place, group(2, bodies_run.train, str(place / "run.yaml"), [])[0])
