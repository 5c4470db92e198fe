"""What follows a finished run: its checkpoint verified, figure, export, a sample, and what to try next."""

from __future__ import annotations

from pathlib import Path

from trainer import runfolder
from trainer.checkpoint import export as exports
from trainer.checkpoint import manifest as manifests
from trainer.evaluate.sampling import Sampling
from trainer.evaluate.text import generate, load_tokenizer
from trainer.metrics.figure import loss_figure, throughput_figure
from trainer.metrics.history import read


def finish(run: Path) -> None:
    """Print and write everything that a finished run leaves behind."""
    config = runfolder.open_run(run)
    newest, manifest = manifests.pick(run)
    print(f"checkpoint  {newest}: {len(manifest.files)} files, {len(manifest.tensors)} tensors, every SHA-256 right")
    figures = run / "figures"
    loss_figure(run / "metrics.jsonl", figures / "loss.png", config.name, _unigram(run))
    throughput_figure(run / "metrics.jsonl", figures / "throughput.png", config.name)
    print(f"figures     {figures / 'loss.png'}, {figures / 'throughput.png'}")
    if config.finish.export:
        folder, fresh = exports.export_of(run)
        print(f"export      {folder}: {'logits equal to the trainer' if fresh else 'made before'}")
        _samples(run, folder, config.finish.prompts)
    name = config.name if config.runs == "runs" else f"{config.name} --runs={config.runs}"
    print("what to try next:")
    print(f'  orthogon generate {name} --prompt "def main("')
    print(f'  orthogon resume {name} --train.length="{2 * read(run / "metrics.jsonl")[-1]["step"]} steps"')
    print(f"  orthogon checkpoint verify {name}")


def _samples(run: Path, export: Path, prompts: list[str]) -> None:
    if prompts:
        model, room, device = exports.loaded_model(run, None, export)
        pieces = generate(model, load_tokenizer(run), prompts, Sampling(tokens=96), room=room, device=device)
        for _, _, text in pieces:
            if text is not None:
                print(f"sample\n{text.prompt}{text.continuation}\n")


def _unigram(run: Path) -> float | None:
    for event in runfolder.events(run):
        if event["event"] == "data":
            return float(event["unigram_bits_per_byte"])
    return None
