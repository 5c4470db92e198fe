"""`python -m trainer TASK ...`: what a rank, or a helper process with torch, runs.

Tasks: train FOLDER_OR_YAML, prepare YAML, verify-table TABLE, export RUN, generate RUN, finish RUN. People use `orthogon` instead.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from trainer.guard.signals import Flag
from trainer.outcome import Outcome, RunError, write_outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True)
    train = tasks.add_parser("train", help="one rank of a run")
    train.add_argument("target", type=Path)
    train.add_argument("--attempt", type=int, default=None)
    prepare = tasks.add_parser("prepare", help="make the token table")
    prepare.add_argument("target", type=Path)
    verify = tasks.add_parser("verify-table", help="check a token table")
    verify.add_argument("target", type=Path)
    export = tasks.add_parser("export", help="to the Hugging Face format")
    export.add_argument("target", type=Path)
    export.add_argument("--step", type=int, default=None)
    export.add_argument("--to", type=Path, default=None)
    generate = tasks.add_parser("generate", help="continue prompts")
    generate.add_argument("target", type=Path)
    generate.add_argument("--prompt", action="append", required=True)
    generate.add_argument("--tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    finish = tasks.add_parser("finish", help="verify, export, figure, sample")
    finish.add_argument("target", type=Path)
    arguments, overrides = parser.parse_known_args()
    if overrides and arguments.task not in ("train", "prepare"):
        parser.error(f"not understood: {' '.join(overrides)}")
    if arguments.task == "train":
        return train_rank(arguments.target, arguments.attempt, overrides)
    try:
        return _helper(arguments, overrides)
    except RunError as error:
        print(error, file=sys.stderr)
        return error.outcome.code


def train_rank(target: Path, attempt: int | None, overrides: list[str]) -> int:
    """One rank of a run, from its folder, or from a YAML file when no launcher made the folder."""
    flag = Flag().install()
    rank = int(os.environ.get("RANK", "0"))
    logs: Path | None = None
    try:
        folder, number = _folder(target, attempt, overrides, rank)
        logs = folder / "logs" / str(number)
        _log_to(logs / f"rank-{rank}.log", keep_stdout=rank == 0)
        outcome, message, facts = _train(folder, number, flag)
    except RunError as error:
        outcome, message, facts = error.outcome, str(error), {}
        print(error, file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        outcome, message, facts = Outcome.BUG, f"rank {rank}: {type(error).__name__}: {error}", {}
    sys.stdout.flush()
    # A rank that fails alone speaks for all: the others are about to be ended by torchrun.
    if logs is not None and (rank == 0 or (not outcome.orderly and not (logs / "outcome.json").exists())):
        write_outcome(logs, outcome, message, rank=rank, **facts)
    return 0 if outcome.orderly and "TORCHELASTIC_RUN_ID" in os.environ else outcome.code


def _train(folder: Path, attempt: int, flag: Flag) -> tuple[Outcome, str, dict[str, int]]:
    from trainer import distributed, loop, runfolder, setup

    config = runfolder.open_run(folder)
    run = setup.set_up(folder, config, attempt, flag)
    try:
        outcome, message = loop.train(run)
    finally:
        run.trace.close()
    run.history.close(hurry=outcome is Outcome.PREEMPTED)
    distributed.stop()
    return outcome, message, {"step": run.step, "position": run.position}


def _folder(target: Path, attempt: int | None, overrides: list[str], rank: int) -> tuple[Path, int]:
    """The run folder and attempt; made by rank 0 when the target is a YAML file."""
    from trainer import config as configuration
    from trainer import runfolder

    if target.is_dir():
        if attempt is None and "WORLD_SIZE" in os.environ:
            raise RunError("several ranks need --attempt", mend="start through `orthogon resume`")
        return target, attempt if attempt is not None else runfolder.new_attempt(target)
    config = configuration.load(target, overrides)
    if rank == 0:
        runfolder.create(config, runfolder.command_line())
        runfolder.new_attempt(config.folder)
    else:
        _wait_for(config.folder / "logs" / "1")
    return config.folder, 1


def _wait_for(path: Path) -> None:
    import time

    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise RunError(f"rank 0 did not make {path}", mend="see its log", outcome=Outcome.INFRASTRUCTURE)


def _log_to(path: Path, *, keep_stdout: bool) -> None:
    """Send this process's stderr (and, but for rank 0, stdout) to the rank's log, native libraries included."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    if not keep_stdout:
        os.dup2(log, 1)
    os.close(log)


def _helper(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from trainer import config as configuration

    target: Path = arguments.target
    if arguments.task == "prepare":
        from trainer import data

        config = configuration.load(target, overrides)
        print(f"token table: {data.prepare(config.data, print)}")
        return 0
    if arguments.task == "verify-table":
        from trainer import data

        data.verify(target)
        print(f"{target}: good")
        return 0
    from transformers.utils import logging

    logging.disable_progress_bar()
    from trainer.checkpoint import export as exports
    from trainer.checkpoint import manifest as manifests

    if arguments.task == "export":
        folder = target / "checkpoints" / manifests.name(arguments.step) if arguments.step is not None else None
        if folder is None or not folder.exists():
            known = manifests.generations(target / "checkpoints")
            if folder is not None or not known:
                names = ", ".join(p.name for p in known) or "none"
                raise RunError("there is no such checkpoint", where=str(target), mend=f"checkpoints: {names}")
            folder = known[0]
        goal = arguments.to or target / "export" / folder.name
        difference = exports.export(target, folder, goal)
        print(f"exported {folder.name} to {goal}; largest difference of logits: {difference:g}")
    elif arguments.task == "generate":
        from trainer.evaluate.generate import generate

        folder, _ = exports.newest_export(target)
        for text in generate(
            folder, arguments.prompt, tokens=arguments.tokens, temperature=arguments.temperature,
            top_p=arguments.top_p, seed=arguments.seed,
        ):  # fmt: skip
            print(text)
    else:
        from trainer.finish import finish

        finish(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
