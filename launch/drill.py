"""`orthogon doctor --drill soak`: one run on this machine, killed, corrupted, starved and poisoned at random, beside a calm one.

Every attempt gets some faults from inside (`trainer/guard/faults.py`) and one end from outside; between attempts the newest
checkpoint may be damaged. At the end weights, moments and history must equal the calm run's to the bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import children, evidence, process
from trainer import runfolder
from trainer.checkpoint import contents
from trainer.checkpoint import manifest as manifests
from trainer.files import write_json
from trainer.guard import faults, heartbeat
from trainer.metrics import history
from trainer.outcome import Outcome, RunError

RANKS, SAVE_EVERY = 2, 2
ENDS = ("kill rank", "kill agent", "kill all", "kill in save", "signal")
INSIDE = ("transient NaN", "disk full")
DAMAGES = ("truncate", "flip a bit")
SAVE_POINTS = (
    "save.begin",
    "save.write",
    "save.after_shard",
    "save.hash",
    "save.before_manifest",
    "save.rename",
    "save.renamed",
)
PATIENCE = 300.0
"""Seconds in which an attempt must get where it is to be struck, or end."""
WORDS = "the of sea light runs over under seven stones while green birds sing and nobody hears it"
CONFIG = """\
name: calm
runs: {folder}/runs
model:
  config: {{model_type: llama, hidden_size: 24, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 3,
           num_key_value_heads: 3}}
data: {{path: "{folder}/corpus.txt", folder: "{folder}/prepared", documents: paragraph, validation_fraction: 0.2,
        tokenizer: {{vocab_size: 301}}, sequence_length: 16}}
train: {{length: {steps} steps, tokens_per_step: 128, micro_batch_size: 2}}
optim: {{name: normuon, lr: 0.003, polar_dtype: fp32}}
parallel: {{name: fsdp2}}
checkpoint: {{every: {every} steps, keep: 3}}
evaluate: {{every: 50 steps}}
guard: {{spike_threshold: null}}
resources: {{device: cpu, ranks: {ranks}}}
finish: {{export: false}}
"""


@dataclass
class Tally:
    """What was done to the run."""

    faults: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    problems: list[str] = field(default_factory=list)


def soak(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Strike one run `count` times in `folder`, which is made; returns the figures.

    Raises:
        RunError: the folder exists, or the run did not end as the calm one, or at all.
    """
    prepare(folder, steps=2 * count + 20)
    say(f"the calm run, {2 * count + 20} steps on {RANKS} ranks, in {folder}")
    began = time.monotonic()
    calm, struck = folder / "runs/calm", folder / "runs/struck"
    _end(_start(folder, "calm", ""), "the calm run")
    quiet = time.monotonic() - began
    tally, dice = Tally(), random.Random(seed)
    while tally.faults.total() < count:
        attempt(folder, struck, count - tally.faults.total(), dice, tally, say)
    _end(_start(folder, "struck", ""), "the struck run")
    tally.attempts += 1
    same = _weights(struck) == _weights(calm) and _history(struck) == _history(calm)
    report = {
        "faults": dict(tally.faults), "injected": tally.faults.total(), "attempts": tally.attempts, "seed": seed,
        "lost_steps": trained_again(struck), "bit_identical": same, "problems": tally.problems,
        "calm_seconds": round(quiet, 1), "seconds": round(time.monotonic() - began - quiet, 1),
    }  # fmt: skip
    write_json(folder / "soak.json", report)
    if not same or tally.problems:
        raise RunError(
            "the struck run did not end as the calm one: " + ("; ".join(tally.problems) or "other weights or history"),
            where=str(folder),
            mend="compare runs/calm and runs/struck there; the drill repeats with the same --seed",
            outcome=Outcome.BUG,
        )
    return report


def prepare(folder: Path, steps: int) -> None:
    """A small corpus and a configuration."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise RunError("the folder of the drill exists", where=str(folder), mend="choose another --folder") from None
    words = WORDS.split()
    lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + f" {i}." for i in range(40)]
    (folder / "corpus.txt").write_text("\n\n".join(lines), encoding="utf-8")
    text = CONFIG.format(folder=folder.absolute(), steps=steps, every=SAVE_EVERY, ranks=RANKS)
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def attempt(folder: Path, run: Path, left: int, dice: random.Random, tally: Tally, say: Callable[[str], None]) -> None:
    """One attempt: faults from inside, an end from outside, and perhaps damage afterwards."""
    newest = _newest(run)
    tally.attempts += 1
    inside = [kind for kind in INSIDE if dice.random() < 0.7][: left - 1]
    end = dice.choice(ENDS)
    step = newest + SAVE_EVERY + dice.randint(1, SAVE_EVERY)
    asked, number = [], max(evidence.attempts(run), default=0) + 1
    for kind in inside:
        rank = dice.randrange(RANKS)
        if kind == "transient NaN":
            point = dice.choice(("step.loss", "step.gradient"))
            asked.append(f"nan@{point} rank={rank} step={newest + 1} attempt={number}")
        else:
            point = dice.choice(("save.write", "save.after_shard", "save.hash"))
            asked.append(f"ENOSPC@{point} rank={rank} step={newest + SAVE_EVERY} attempt={number}")
    if end == "kill in save":
        point, save = dice.choice(SAVE_POINTS), newest + 2 * SAVE_EVERY
        rank = 0 if point in SAVE_POINTS[4:] else dice.randrange(RANKS)
        asked.append(f"kill@{point} rank={rank} step={save} attempt={number}")
    launcher = _start(folder, "struck", "; ".join(asked))
    logs = run / "logs" / str(number)
    if end != "kill in save":
        _until(lambda: _reached(logs, step) or launcher.poll() is not None, f"attempt {number} reaches step {step}")
        strike(end, launcher, logs, dice)
    code = _wait(launcher, f"attempt {number} ends after '{end}'")
    wanted = {"signal": Outcome.PREEMPTED.code, "kill all": -signal.SIGKILL}.get(end, Outcome.INFRASTRUCTURE.code)
    if code != wanted:
        tally.problems.append(f"attempt {number} ({end}) ended with {code}, not with {wanted}")
    tally.faults.update([end, *inside])
    known = manifests.generations(run / "checkpoints")
    if left > len(inside) + 1 and len(known) > 1 and dice.random() < 0.4:
        kind = dice.choice(DAMAGES)
        damage(known[0], kind, dice)
        tally.faults[kind] += 1
    say(
        f"{tally.faults.total():4} faults, attempt {number}: {', '.join([*inside, end])}; newest checkpoint {_newest(run)}"
    )


def strike(end: str, launcher: subprocess.Popen[Any], logs: Path, dice: random.Random) -> None:
    """End an attempt from outside."""
    ranks = [beat.pid for beat in heartbeat.read_all(logs).values()]
    below = children.descendants(launcher.pid)
    agents = [pid for pid in below if pid not in ranks]
    victims = {
        "kill rank": [dice.choice(ranks)], "kill agent": agents[:1], "kill all": [launcher.pid, *below],
        "signal": [dice.choice(ranks)],
    }[end]  # fmt: skip
    for pid in victims:
        try:
            os.kill(pid, dice.choice((signal.SIGTERM, signal.SIGUSR1)) if end == "signal" else signal.SIGKILL)
        except ProcessLookupError:
            continue


def trained_again(run: Path) -> int:
    """Steps that were trained more than once, from what the attempts left behind."""
    began = {e["attempt"]: e["step"] for e in runfolder.events(run) if e["event"] == "resumed"}
    trained = 0
    for number in evidence.attempts(run):
        done = evidence.steps_done(run / "logs" / str(number))
        trained += max(0, done - began.get(number, 0))
    return trained - _newest(run)


def damage(generation: Path, kind: str, dice: random.Random) -> None:
    """Truncate a file of a checkpoint, or flip one bit of it."""
    file = dice.choice(sorted(path for path in generation.iterdir() if path.stat().st_size))
    data = bytearray(file.read_bytes())
    if kind == "truncate":
        data = data[: dice.randrange(len(data))]
    else:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def _start(folder: Path, name: str, asked: str) -> subprocess.Popen[Any]:
    run = folder / "runs" / name
    words = [name, f"--runs={folder.absolute()}/runs"] if run.exists() else [str(folder / "run.yaml"), f"--name={name}"]
    verb = "resume" if run.exists() else "run"
    with open(folder / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", verb, *words, "--restarts=0"], stdout=log, stderr=log,
            env=process.environment(**{faults.VARIABLE: asked}), start_new_session=True,
        )  # fmt: skip


def _end(launcher: subprocess.Popen[Any], what: str) -> None:
    code = _wait(launcher, f"{what} ends", seconds=None)
    if code:
        raise RunError(f"{what} ended with {code}", mend="see its log in the drill's folder", outcome=Outcome.BUG)


def _wait(launcher: subprocess.Popen[Any], what: str, seconds: float | None = PATIENCE) -> int:
    try:
        return launcher.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in [launcher.pid, *children.descendants(launcher.pid)]:
            os.kill(pid, signal.SIGKILL)
        raise RunError(f"waited {seconds:g} s in vain: {what}", outcome=Outcome.BUG) from None


def _until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > deadline:
            raise RunError(f"waited {PATIENCE:g} s in vain: {what}", outcome=Outcome.BUG)
        time.sleep(0.02)


def _reached(logs: Path, step: int) -> bool:
    beats = heartbeat.read_all(logs).values()
    return len(beats) == RANKS and all(beat.step >= step for beat in beats)


def _newest(run: Path) -> int:
    return max(map(manifests.step_of, manifests.generations(run / "checkpoints")), default=0)


def _weights(run: Path) -> dict[str, str]:
    newest = manifests.generations(run / "checkpoints")[0]
    manifests.verify(newest)
    return contents.digests(newest)


def _history(run: Path) -> list[dict[str, Any]]:
    return [history.lasting(record) for record in history.read(run / "metrics.jsonl")]
