"""What a run takes over from a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer import distributed
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.load import load, newest_verified
from trainer.metrics import history
from trainer.outcome import RunError
from trainer.run import Run


def restore(run: Run) -> None:
    """Load the newest checkpoint that verifies; without one, start at step 0 with an empty history."""
    found = newest_verified(run.checkpoints)
    if found is not None:
        folder, manifest = found
        new = configuration.resolved(run.config)

        def same_run() -> dict[str, Any]:
            changed = configuration.check_resume(manifest.config, new)
            check_data(manifest, run.data.identity())
            return changed

        changed = distributed.together(same_run)
        entries = take_over(run, folder, manifest)
        run.saved_step = manifest.step
        run.progress.say(f"resumed from {folder.name}: {entries} tensors restored, position {run.position}")
        if distributed.rank() == 0:
            kept = {key: list(values) for key, values in changed.items()}
            run.event("resumed", attempt=run.attempt, step=run.step, changed=kept)
            for key, (before, after) in changed.items():
                run.progress.say(f"changed since the save: {key} from {before!r} to {after!r}")
    if distributed.rank() == 0:
        for file in (run.folder / "metrics.jsonl", run.samples.path):
            history.cut(file, run.step)


def take_over(run: Run, folder: Path, manifest: manifests.Manifest) -> int:
    """Be where a verified checkpoint was; returns the number of tensors."""
    entries = restore_tensors(run, folder, manifest)
    state = manifest.state
    run.step, run.position = manifest.step, manifest.position
    run.skips, run.applied, run.rollbacks = state["skips"], state["applied"], state["rollbacks"]
    run.skipped, run.validated_step = list(state["skipped"]), state["validated_step"]
    run.detector.load(state["detector"])
    return entries


def restore_tensors(run: Run, folder: Path, manifest: manifests.Manifest) -> int:
    """Fill weights and optimizer state from a verified checkpoint; returns the number of tensors."""
    tensors = run.tensors()
    entries = load(folder, manifest, tensors)
    run.strategy.adopt(tensors, run.model, run.optimizer, run.names)
    return entries


def check_data(manifest: manifests.Manifest, identity: dict[str, Any]) -> None:
    """Refuse to go on with other data than the checkpoint's."""
    saved = manifest.state["data"]
    facts = [("another tokenizer", saved["tokenizer"], identity["tokenizer"])]
    for name, source in identity["sources"].items():
        what = "other training tokens" if len(identity["sources"]) == 1 else f"other training tokens of {name}"
        facts.append((what, saved["sources"][name]["train_sha256"], source["train_sha256"]))
    for what, before, now in facts:
        if before != now:
            raise RunError(
                f"the prepared data has {what} than the checkpoint of step {manifest.step} was trained on",
                where=f"data ({before[:12]} was saved, {now[:12]} is here)",
                mend="give the table of that run as data.table, or start a new run",
            )
