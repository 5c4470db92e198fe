"""The verbs of `orthogon`. Starts in a blink: torch is loaded only by the processes that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from trainer.outcome import Outcome, RunError


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train in the foreground through torchrun; `--section.key=value` overrides the file."""

    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""
    dry_run: bool = False
    """Print the command and the configuration, and start nothing."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on from the newest checkpoint that verifies; `--section.key=value` for what a resume may change."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's name."""
    runs: Path = Path("runs")
    """The folder of the run folders."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with the newest checkpoint (exported first if it is not yet)."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's name."""
    prompt: str
    """The text to continue."""
    tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.8
    """Spread of the sampling; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the sampling."""
    runs: Path = Path("runs")
    """The folder of the run folders."""


@dataclass(frozen=True, kw_only=True)
class CheckpointList:
    """The finished checkpoints of a run."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's name."""
    runs: Path = Path("runs")
    """The folder of the run folders."""


@dataclass(frozen=True, kw_only=True)
class CheckpointVerify:
    """Check size and SHA-256 of every file of every checkpoint; changes nothing."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's name."""
    runs: Path = Path("runs")
    """The folder of the run folders."""


@dataclass(frozen=True, kw_only=True)
class CheckpointExport:
    """Write a checkpoint in the Hugging Face format, proven by comparing logits."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's name."""
    step: int | None = None
    """The step of the checkpoint; none takes the newest."""
    to: Path | None = None
    """The new folder; none takes RUN/export/step-N."""
    runs: Path = Path("runs")
    """The folder of the run folders."""


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Make the token table that a configuration needs; restartable. `--section.key=value` overrides the file."""

    config: Annotated[Positional[Path], arg(metavar="CONFIG")]
    """The YAML file of the run."""


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Check size and SHA-256 of a token table; changes nothing."""

    table: Annotated[Positional[Path], arg(metavar="TABLE")]
    """The folder of the table."""


Checkpoint = Union[
    Annotated[CheckpointList, subcommand("list")],
    Annotated[CheckpointVerify, subcommand("verify")],
    Annotated[CheckpointExport, subcommand("export")],
]
Data = Union[
    Annotated[DataPrepare, subcommand("prepare")],
    Annotated[DataVerify, subcommand("verify")],
]
Verb = Union[
    Annotated[Run, subcommand("run")],
    Annotated[Resume, subcommand("resume")],
    Annotated[Generate, subcommand("generate")],
    Annotated[Checkpoint, subcommand("checkpoint", description="Look at, verify and export checkpoints.")],
    Annotated[Data, subcommand("data", description="Make and verify token tables.")],
]
VERBS = ("run", "resume", "generate", "checkpoint", "data")
WITH_OVERRIDES = (Run, Resume, DataPrepare)


def main() -> None:
    """Entry point of the command line."""
    try:
        sys.exit(dispatch(sys.argv[1:]))
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.outcome.code)


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command line; returns the exit code."""
    from trainer.yaml_source import nearest

    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        guess = nearest(arguments[0], list(VERBS))
        mend = f"did you mean {guess}?" if guess else f"verbs: {', '.join(VERBS)}"
        raise RunError(f"there is no verb '{arguments[0]}'", where="command line", mend=mend)
    verb, rest = tyro.cli(
        Verb, prog="orthogon", description="Pretrain language models.", args=arguments, return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    if rest and not isinstance(verb, WITH_OVERRIDES):
        raise RunError(
            f"'{rest[0]}' is not understood", where="command line", mend=f"see orthogon {arguments[0]} --help"
        )
    handlers: dict[type, Any] = {
        Run: run, Resume: resume, Generate: generate, CheckpointList: checkpoint_list,
        CheckpointVerify: checkpoint_verify, CheckpointExport: checkpoint_export, DataPrepare: data_prepare,
        DataVerify: data_verify,
    }  # fmt: skip
    handler = handlers[type(verb)]
    code: int = handler(verb, rest) if isinstance(verb, WITH_OVERRIDES) else handler(verb)
    return code


def run(verb: Run, overrides: list[str]) -> int:
    import yaml

    from launch.backends import torchrun
    from trainer import config as configuration
    from trainer import runfolder

    config = configuration.load(verb.config, overrides)
    if verb.dry_run:
        print(yaml.safe_dump(configuration.resolved(config), sort_keys=False))
        print(" ".join(torchrun.command(config, config.folder, 1)))
        return 0
    folder = runfolder.create(config, runfolder.command_line())
    return _attempt(config, folder)


def resume(verb: Resume, overrides: list[str]) -> int:
    from trainer import runfolder

    folder = _run_folder(verb.run, verb.runs)
    config = runfolder.open_run(folder, overrides)
    if overrides:
        runfolder.write_config(folder, config)
    return _attempt(config, folder)


def _attempt(config: Any, folder: Path) -> int:
    """One attempt in the foreground, and what follows it."""
    from launch.backends import torchrun
    from trainer import runfolder

    number = runfolder.new_attempt(folder)
    outcome = torchrun.run(config, folder, number)
    word = outcome["outcome"]
    log = folder / "logs" / str(number)
    print(
        f"{word}: {outcome['message']}" if not outcome["message"].startswith("error:") else outcome["message"],
        flush=True,
    )
    if word == Outcome.FINISHED.value:
        return _python("finish", str(folder))
    name = config.name if config.runs == "runs" else f"{config.name} --runs={config.runs}"
    if word in (Outcome.PREEMPTED.value, Outcome.INFRASTRUCTURE.value, Outcome.NO_SPACE.value):
        print(f"go on with: orthogon resume {name}")
    if word in (Outcome.BUG.value, Outcome.INFRASTRUCTURE.value):
        print(f"logs: {log}/rank-*.log, {log}/torchrun.log")
    return int(outcome["exit_code"])


def generate(verb: Generate) -> int:
    return _python(
        "generate", str(_run_folder(verb.run, verb.runs)), f"--prompt={verb.prompt}", f"--tokens={verb.tokens}",
        f"--temperature={verb.temperature}", f"--top-p={verb.top_p}", f"--seed={verb.seed}",
    )  # fmt: skip


def checkpoint_list(verb: CheckpointList) -> int:
    from trainer.checkpoint import manifest as manifests

    folder = _run_folder(verb.run, verb.runs)
    for path in manifests.generations(folder / "checkpoints"):
        try:
            found = manifests.read(path)
        except manifests.Damaged as damage:
            print(f"{path.name}  damaged: {damage}")
            continue
        size = sum(file["size"] for file in found.files.values())
        print(f"{path.name}  position {found.position}  {found.world_size} ranks  {size / 1e6:,.1f} MB")
    return 0


def checkpoint_verify(verb: CheckpointVerify) -> int:
    from trainer.checkpoint import manifest as manifests

    folder = _run_folder(verb.run, verb.runs)
    paths = manifests.generations(folder / "checkpoints")
    if not paths:
        raise RunError(f"run {verb.run} has no checkpoint", where=str(folder), mend=f"orthogon resume {verb.run}")
    bad = 0
    for path in paths:
        try:
            found = manifests.verify(path)
            print(f"{path.name}  good: {len(found.files)} files, {len(found.tensors)} tensors")
        except manifests.Damaged as damage:
            bad += 1
            print(f"{path.name}  damaged: {damage}")
    return Outcome.INFRASTRUCTURE.code if bad else 0


def checkpoint_export(verb: CheckpointExport) -> int:
    options = [f"--step={verb.step}"] if verb.step is not None else []
    options += [f"--to={verb.to}"] if verb.to is not None else []
    return _python("export", str(_run_folder(verb.run, verb.runs)), *options)


def data_prepare(verb: DataPrepare, overrides: list[str]) -> int:
    from trainer import config as configuration

    configuration.load(verb.config, overrides)  # a typo costs a blink, not the import of torch
    return _python("prepare", str(verb.config), *overrides)


def data_verify(verb: DataVerify) -> int:
    return _python("verify-table", str(verb.table))


def _run_folder(name: str, runs: Path) -> Path:
    """The folder of an existing run, by its name."""
    from trainer import runfolder

    if Path(name).name != name or name in ("", ".", ".."):
        raise RunError(
            f"'{name}' is no run name", where="command line", mend="give the name alone; --runs=FOLDER says where"
        )
    runfolder.open_run(runs / name)
    return runs / name


def _python(*task: str) -> int:
    """Run a task that needs torch in a process of its own."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, "-m", "trainer", *task], env=environment, check=False).returncode


if __name__ == "__main__":
    main()
