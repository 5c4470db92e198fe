"""`python -m trainer TASK TARGET ...`: what a rank, or a helper process with torch, runs. People use `orthogon` instead.

TARGET is a run folder; for `train` and `prepare` a YAML file, for `verify-table` a table's folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from trainer.guard.signals import Flag

FLAG = Flag()
if __name__ == "__main__" and sys.argv[1:2] == ["train"]:
    FLAG.install()  # before the imports that take a second: a signal from now on ends in a saved checkpoint

from trainer import environment, tasks  # noqa: E402
from trainer.guard import heartbeat  # noqa: E402
from trainer.guard.faults import fault  # noqa: E402
from trainer.guard.watchdog import Watchdog  # noqa: E402
from trainer.outcome import Outcome, RunError, speak, write_outcome  # noqa: E402
from trainer.tasks import TASKS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__, allow_abbrev=False)
    parsers = parser.add_subparsers(dest="task", required=True)
    train = parsers.add_parser("train", help="one rank of a run")
    train.add_argument("target", type=Path)
    train.add_argument("--attempt", type=int, default=None)
    train.add_argument("--verify", action="store_true", help="train the last recorded steps once more, and compare")
    for name, task in TASKS.items():
        one = parsers.add_parser(name, help=task.help, allow_abbrev=False)
        one.add_argument("target", type=Path)
        task.options(one)
    arguments, overrides = parser.parse_known_args()
    if overrides and arguments.task != "train" and not TASKS[arguments.task].overrides:
        parser.error(f"not understood: {' '.join(overrides)}")
    if arguments.task == "train":
        return train_rank(arguments, overrides)
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


def train_rank(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """One rank of a run, from its folder, or from a YAML file when no launcher made the folder."""
    try:
        starter = environment.adopt(os.environ)
    except RunError as error:
        print(error, file=sys.stderr)
        return error.outcome.code
    launched, rank = starter in ("torchrun", "srun", "fork"), int(os.environ.get("RANK", "0"))
    logs: Path | None = None
    watch: Watchdog | None = None
    lost = False
    try:
        folder, number = _folder(arguments.target, arguments.attempt, overrides, rank)
        logs = folder / "logs" / str(number)
        _log_to(logs / f"rank-{rank}.log", keep_stdout=rank == 0)
        # A fork is told by SIGTERM that its supervisor is gone, and saves.
        bound = launched and starter != "fork"
        watch = Watchdog(heartbeat.Heartbeat(heartbeat.path_of(logs, rank)), FLAG, logs, rank, bound).start()
        outcome, message, facts = _train(folder, number, watch, arguments.verify)
    except RunError as error:
        outcome, message, facts = error.outcome, error.what if error.outcome.orderly else str(error), {}
        print(error, file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        lost = _lost_peers(error)
        outcome = Outcome.INFRASTRUCTURE if lost else Outcome.BUG
        message, facts = f"rank {rank}: {type(error).__name__}: {error}", {}
        if lost and watch is not None:
            message = (
                f"rank {rank} lost its peers in phase '{watch.heart.phase}' of step {watch.heart.step + 1}: {error}"
            )
    sys.stdout.flush()
    if logs is not None and outcome.orderly and rank == 0:
        fault("end.outcome")
        write_outcome(logs, outcome, message, rank=rank, **facts)
    elif logs is not None and not outcome.orderly:  # the others are about to be ended by torchrun
        speak(logs, outcome, message, rank=rank, lost_peers=lost, **facts)
    if outcome.orderly:
        # Another code would make torchrun, or srun --kill-on-bad-exit, end ranks that are still leaving.
        return 0 if launched else outcome.code
    sys.stderr.flush()
    os._exit(outcome.code)  # what libraries do at exit may wait for ranks that are gone


def _train(folder: Path, attempt: int, watch: Watchdog, verify: bool) -> tuple[Outcome, str, dict[str, int]]:
    from trainer import distributed, loop, runfolder, setup

    config = runfolder.open_run(folder)
    run = setup.set_up(folder, config, attempt, watch, verify)
    try:
        outcome, message = loop.train(run)
    except BaseException:
        run.trace.close()
        raise
    watch.heart.beat("exit")
    run.close(hurry=outcome is Outcome.PREEMPTED)
    distributed.stop()
    return outcome, message, {"step": run.step, "position": run.position}


def _lost_peers(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone."""
    from trainer.distributed import lost_peers

    return lost_peers(error)


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
