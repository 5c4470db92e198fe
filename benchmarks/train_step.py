"""Our training step against a Hugging Face Trainer's, both under FSDP2 (or DDP), on the same ranks in one invocation.

    python benchmarks/train_step.py [--steps 10] [--rounds 7] [--ranks 2] [--strategy fsdp2] [--precision fp32]

The same model (a Llama of 2.6M parameters), tokens per step, micro-batch, fused AdamW, clipping and learning rate. The
Trainer (transformers, with accelerate's FSDP2: `fsdp_version` 2, blocks wrapped, resharded after the forward) runs one
long training; a callback pauses it after every `--steps` of its steps, and `--steps` of ours run in the same processes,
with all that a step of a run does: data, one agreed verdict, clipping, learning rate, a line of history. Prints tokens
per second as medians with least and most, and the ratio of each pair of neighbours.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": False,
}  # fmt: skip
LENGTH, VOCABULARY, SEQUENCES = 256, 2048, 8
RATE, CLIP = 1e-3, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of each side per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", choices=["fsdp2", "ddp"], default="fsdp2", help="of both sides")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--micro-steps", type=int, default=1)
    parser.add_argument("--keep-gathered", action="store_true", help="reshard_after_forward: false on both sides")
    parser.add_argument(
        "--ours", action="append", default=[], help="an override of our configuration, SECTION.KEY=VALUE"
    )
    parser.add_argument("--profile", type=Path, default=None, help="write a table of our operators here, and stop")
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}",
            __file__, *sys.argv[1:], f"--folder={folder}",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=environment, cwd=ROOT)


def ours(arguments: argparse.Namespace) -> Any:
    """A run that is set up, with nothing left out."""
    import yaml

    from trainer import config as configuration
    from trainer import runfolder, setup
    from trainer.guard.heartbeat import Heartbeat
    from trainer.guard.signals import Flag
    from trainer.guard.watchdog import Watchdog

    # A micro-step of either side takes the same rows.
    rows = SEQUENCES // (arguments.ranks * arguments.micro_steps)
    raw = {
        "name": "step", "runs": str(arguments.folder), "model": {"config": MODEL},
        "data": {"path": "stdlib", "folder": str(ROOT / "prepared"), "sequence_length": LENGTH, "tokenizer": {"vocab_size": VOCABULARY}},
        "train": {
            "length": "1000000 steps", "tokens_per_step": SEQUENCES * LENGTH, "micro_batch_size": rows,
            "clip_norm": CLIP, "precision": arguments.precision,
        },
        "optim": {"name": "adamw", "lr": RATE},
        "schedule": {"name": "constant", "warmup": 0.0},
        "parallel": {"name": "ddp"} if arguments.strategy == "ddp" else {
            "name": "fsdp2", "reshard_after_forward": not arguments.keep_gathered,
        },
    }  # fmt: skip
    file = arguments.folder / "run.yaml"
    if int(os.environ["RANK"]) == 0:
        file.with_suffix(".part").write_text(yaml.safe_dump(raw))
        file.with_suffix(".part").rename(file)
    while not file.exists():
        time.sleep(0.05)
    config = configuration.load(file, [f"--{change}" for change in arguments.ours])
    if int(os.environ["RANK"]) == 0:
        runfolder.create(config, ["benchmark"])
    while not (config.folder / "checkpoints").exists():
        time.sleep(0.05)
    run = setup.set_up(config.folder, config, 1, Watchdog(Heartbeat(None), Flag(), config.folder, 0))
    run.progress.shown = False
    return run


def our_step(run: Any) -> float:
    """What `loop.train` does between two borders; returns the loss."""
    from trainer import loop

    return loop.step(run).loss


def theirs(arguments: argparse.Namespace, run: Any, callback: Any) -> Any:
    """A Hugging Face Trainer with the same model, rows and optimizer."""
    import numpy as np
    import torch
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainingArguments

    from trainer.model.build import architecture, build
    from trainer.model.init import initialize

    table = next(iter(run.data.tables.values()))
    facts = table.facts
    model = build(
        architecture(
            run.config.model, vocab_size=facts["vocab_size"], bos=facts["bos"], eos=facts["eos"], max_length=LENGTH
        )
    )
    initialize(model, 0, torch.device("cpu"))
    tokens = torch.from_numpy(table.train.rows(np.arange(table.train.sequences))[0][:, :LENGTH].copy())

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": tokens[index], "labels": tokens[index]}

    sharding: dict[str, Any] = {}
    if arguments.strategy == "fsdp2":
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        sharding = {"fsdp": True, "fsdp_config": {**wrap, "reshard_after_forward": not arguments.keep_gathered}}
    settings = TrainingArguments(
        output_dir=str(arguments.folder / "theirs"), use_cpu=run.device.type == "cpu", disable_tqdm=True, report_to=[],
        per_device_train_batch_size=SEQUENCES // (arguments.ranks * arguments.micro_steps),
        gradient_accumulation_steps=arguments.micro_steps, bf16=arguments.precision == "bf16",
        max_steps=arguments.steps * (arguments.rounds + 1), learning_rate=RATE, lr_scheduler_type="constant",
        optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=CLIP,
        save_strategy="no", logging_steps=arguments.steps, ddp_find_unused_parameters=False, **sharding,
    )  # fmt: skip
    if arguments.strategy == "ddp":
        return Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[callback])

    class Sharded(Trainer):
        """accelerate leaves its FSDP2 out on a CPU, where it would run DDP: ask for it by hand."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.args.bf16:
                state.fsdp_plugin.set_mixed_precision("bf16")
            self.is_fsdp_enabled = True

    return Sharded(model=model, args=settings, train_dataset=Rows(), callbacks=[callback])


def measure(arguments: argparse.Namespace) -> None:
    """Alternate between the two in one process group."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch.distributed as dist
    from transformers import TrainerCallback

    from trainer import distributed
    from trainer.model.build import parameter_count

    run = ours(arguments)
    if arguments.profile is not None:
        profile(run, arguments.profile)
        distributed.stop()
        return
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    losses: dict[str, float] = {}

    class Alternate(TrainerCallback):
        """Our steps after every so many of the Trainer's."""

        since = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
            if state.global_step % arguments.steps:
                return
            dist.barrier()
            now = time.perf_counter()
            if state.global_step > arguments.steps:  # the first round warms both up
                seconds["transformers"].append(now - self.since)
            losses["ours"] = statistics.mean(our_step(run) for _ in range(arguments.steps))
            dist.barrier()
            self.since = time.perf_counter()
            if state.global_step > arguments.steps:
                seconds["ours"].append(self.since - now)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **facts: Any) -> None:
            losses["transformers"] = (logs or {}).get("loss", losses.get("transformers"))

    count = parameter_count(run.model)
    trainer = theirs(arguments, run, Alternate())
    trainer.train()
    kind = type(trainer.model_wrapped).__name__
    assert kind == {"fsdp2": "FSDPLlamaForCausalLM", "ddp": "DistributedDataParallel"}[arguments.strategy], kind
    if distributed.rank() == 0:
        report(arguments, seconds, losses, count)
    distributed.stop()


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], losses: dict[str, float], count: int
) -> None:
    """The table."""
    tokens = arguments.steps * SEQUENCES * LENGTH
    print(
        f"{count:,} parameters, {SEQUENCES} sequences of {LENGTH}, {arguments.micro_steps} micro-steps, {arguments.ranks} ranks, "
        f"{arguments.precision}, {arguments.rounds} rounds of {arguments.steps} steps"
    )
    print("| step | tokens/s, median | least | most | mean loss of the last round |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        rates = [tokens / value for value in values]
        print(
            f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} | {losses[name]:.3f} |"
        )
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    print(f"| ours / transformers | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | |")


def profile(run: Any, target: Path) -> None:
    """Where our own step spends its time, on rank 0."""
    import torch

    for _ in range(5):
        our_step(run)
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            our_step(run)
    if int(os.environ["RANK"]) == 0:
        target.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=60))


if __name__ == "__main__":
    main()
