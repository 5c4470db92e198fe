"""`python -m trainer TASK TARGET ...`: what a rank, or a helper process with torch, runs. People use `orthogon` instead.

TARGET is a run folder; for `train` and `prepare` a YAML file, for `verify-table` a table's folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from trainer import tasks
from trainer.guard.signals import Flag
from trainer.outcome import Outcome, RunError, write_outcome
from trainer.tasks import TASKS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__, allow_abbrev=False)
    parsers = parser.add_subparsers(dest="task", required=True)
    train = parsers.add_parser("train", help="one rank of a run")
    train.add_argument("target", type=Path)
    train.add_argument("--attempt", type=int, default=None)
    for name, task in TASKS.items():
        one = parsers.add_parser(name, help=task.help, allow_abbrev=False)
        one.add_argument("target", type=Path)
        task.options(one)
    arguments, overrides = parser.parse_known_args()
    if overrides and arguments.task != "train" and not TASKS[arguments.task].overrides:
        parser.error(f"not understood: {' '.join(overrides)}")
    if arguments.task == "train":
        return train_rank(arguments.target, arguments.attempt, overrides)
    return do_task(arguments, overrides)


def do_task(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """A task other than training. One that answers by file (`--answer`) leaves the reason of its failure there, too."""
    answer: Path | None = getattr(arguments, "answer", None)
    try:
        tasks.run(arguments.task, arguments, overrides)
        return 0
    except KeyboardInterrupt:
        print("stopped" + ("; finished parts are kept, start again to go on" if arguments.task == "prepare" else ""))
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        sys.stderr.close()
        return 0
    except RunError as error:
        outcome, message = error.outcome, str(error)
        print(error, file=sys.stderr)
    except Exception as error:
        if answer is None:
            raise
        traceback.print_exc()
        outcome, message = Outcome.BUG, f"{type(error).__name__}: {error}"
    if answer is not None and not (answer / "outcome.json").exists():
        write_outcome(answer, outcome, message)
    return outcome.code


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


if __name__ == "__main__":
    sys.exit(main())
