"""What a run learns beside its text: for every micro-batch, what the teacher says about it, live or from a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.config import RunConfig
from trainer.data import Data
from trainer.data.batches import Batches, MicroBatch
from trainer.ensemble import cache, manifest
from trainer.ensemble.divergence import install
from trainer.ensemble.states import check_linear
from trainer.ensemble.targets import Dense, Sparse
from trainer.ensemble.teachers import Members, check_vocabulary, resolve
from trainer.outcome import RunError

Target = Dense | Sparse


@dataclass
class Lessons:
    """The teacher of a run."""

    ensemble: manifest.Ensemble
    source: str | None
    """Digest of the cache; None for live members."""
    summary: str
    """For people."""
    ask: Callable[[MicroBatch, Any], Target]
    """What it says about a micro-batch whose rows stand at these positions of the stream."""
    _given: list[Target] = field(default_factory=list)

    def about(self, batch: MicroBatch, batches: Batches, position: int, count: int, index: int) -> Target:
        """What the teacher says about micro-batch `index` of the step at `position`; all ranks ask as often."""
        target = self.ask(batch, batches.places(position, count)[index])
        self._given.append(target)
        return target

    def take(self) -> list[float]:
        """Cross-entropy and divergence of what was given since the last call, summed over this rank's tokens."""
        found = torch.zeros(2, dtype=torch.float64)
        for target in self._given:
            found += target.parts
        self._given.clear()
        return [float(part) for part in found]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the teacher."""
        return {"ensemble": asdict(self.ensemble), "cache": self.source}


def open_lessons(config: RunConfig, folder: Path, data: Data, model: Any, strategy: Any) -> Lessons | None:
    """The teacher of a run, and the model made ready to learn from it; None for a run without one. Collective.

    Raises:
        RunError: on all ranks alike: no such teacher, other tokens, vocabulary or data than the student's, a resume with
            other targets than before, an architecture whose logits are more than its head times hidden states.
    """
    distill = config.distill
    if distill is None or distill.alpha == 0:
        return None
    runs, device = Path(config.runs), strategy.device
    before = distributed.on_rank_zero(lambda: _before(folder))
    ensemble = distributed.on_rank_zero(
        lambda: manifest.of_json(before["ensemble"]) if before is not None else resolve(runs, distill.teacher)
    )
    distributed.together(lambda: check_vocabulary(ensemble, data.tokenizer))
    with strategy.context():
        distributed.together(lambda: check_linear(model, strategy.forward, device))
    strategy.settle(model)
    ask: Callable[[MicroBatch, Any], Target]
    if distill.cache is None:
        members = Members(runs, ensemble, config.train.precision, device, sharded=config.parallel.name == "fsdp2")

        def ask(batch: MicroBatch, places: Any) -> Target:
            return members.answer(batch)

        source, how = None, "live"
    else:
        opened = cache.opened(Path(distill.cache), cache.stream_of(data, config), ensemble)
        distributed.together(lambda: opened.check_temperature(distill.temperature))
        precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32

        def ask(batch: MicroBatch, places: Any) -> Target:
            return opened.read(data.train, places, device, precision)

        source, how = opened.digest, f"{opened.summary} in {distill.cache}"
    if before is not None and before["cache"] != source:
        raise RunError(
            "the run began with other targets than it would go on with: those of "
            + ("another cache" if source and before["cache"] else "live members" if source else "a cache"),
            where="distill.cache",
            mend="give it back the targets that it began with",
        )
    install(model, distill.alpha, distill.temperature, ensemble.vocab_size)
    rule = ensemble.rule if len(ensemble.members) > 1 else "one member"
    summary = f"{ensemble.name}, {rule}" + (f" of {len(ensemble.members)}" if len(ensemble.members) > 1 else "")
    weight = f"alpha {distill.alpha:g}, temperature {distill.temperature:g}"
    return Lessons(ensemble, source, f"{summary}, {how}; {weight}", ask)


def _before(folder: Path) -> dict[str, Any] | None:
    """What the run's newest readable checkpoint keeps of its teacher."""
    for generation in manifests.generations(folder / "checkpoints"):
        try:
            found: dict[str, Any] | None = manifests.read(generation).state.get("teacher")
        except manifests.Damaged:
            continue
        return found
    return None
