"""What an attempt left in its log folder, read without judging it: heartbeats, hang notes, torchrun's notes, logs."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import manifest as manifests
from trainer.files import read_json
from trainer.guard import heartbeat
from trainer.outcome import read_outcome

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
KILLED = {
    "Killed": signal.SIGKILL, "Segmentation fault": signal.SIGSEGV, "Bus error": signal.SIGBUS, "Aborted": signal.SIGABRT,
    "Illegal instruction": signal.SIGILL, "Floating point exception": signal.SIGFPE,
}  # fmt: skip
"""The signals that srun's words mean, without those that ask for an end."""
TAIL = 200_000  # bytes of a log that are looked at


@dataclass(frozen=True)
class Death:
    """A rank that torchrun saw leave with an error."""

    rank: int
    host: str
    code: int
    """Exit code; minus the number of the signal that killed it."""
    first: bool
    """torchrun on its node saw it first."""

    @property
    def signal(self) -> str | None:
        """The name of the signal that killed the rank, unless it was one that asks for an end."""
        if self.code >= 0 or -self.code in ASKED:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


def attempts(folder: Path) -> list[int]:
    """The numbers of the attempts of a run, oldest first."""
    logs = folder / "logs"
    return sorted(int(path.name) for path in logs.iterdir() if path.name.isdigit()) if logs.is_dir() else []


def newest_attempt(folder: Path) -> int:
    """The number of the newest attempt; 0 without one."""
    return max(attempts(folder), default=0)


def logs_of(folder: Path, number: int | None = None) -> list[Path]:
    """The logs of an attempt, the newest if none is given: those of the ranks first, then those of torchrun."""
    known = attempts(folder)
    if not known:
        return []
    logs = folder / "logs" / str(known[-1] if number is None else number)
    ranks = [path for path in logs.glob("rank-*.log") if path.stem.removeprefix("rank-").isdigit()]
    return [*sorted(ranks, key=lambda path: int(path.stem[5:])), *sorted(logs.glob("torchrun*.log"))]


def told(logs: Path) -> dict[str, Any] | None:
    """The outcome that a rank wrote, if one did."""
    return read_outcome(logs) if "outcome.json" in os.listdir(logs) else None  # listed: not from a cache of names


def record(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def last_records(path: Path, having: str = "", count: int | None = None) -> list[dict[str, Any]]:
    """The last JSON objects in a file of lines whose text has `having` in it, oldest first; torn lines are left out.

    Only the end of the file is looked at, and only as many lines are parsed as are asked for.
    """
    found: list[dict[str, Any]] = []
    for line in reversed(tail(path).splitlines()):
        if count is not None and len(found) >= count:
            break
        if having in line:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found[::-1]


def hangs(logs: Path) -> dict[int, dict[str, Any]]:
    """What the watchdogs of the ranks wrote before they ended them, by rank."""
    found = {}
    for path in logs.glob("hang-rank-*.json"):
        number, note = path.stem.removeprefix("hang-rank-"), record(path)
        if number.isdigit() and note is not None:
            found[int(number)] = note
    return dict(sorted(found.items()))


def deaths(logs: Path) -> list[Death]:
    """The ranks that torchrun, on each node, reports as failed: its table, or the one line where it was ended before."""
    found = []
    for path in sorted(logs.glob("torchrun*.log")):
        said = tail(path)
        head, table, root = said.rpartition("Root Cause (first observed failure):")
        if table:
            found += [Death(**facts, first=True) for facts in _table(root)]
            found += [Death(**facts, first=False) for facts in _table(head.rpartition("Failures:")[2])]
            continue
        line = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", said)
        if line and path.name == "torchrun.log":  # one node: the local rank is the rank
            found.append(Death(int(line[2]), "", int(line[1]), first=True))
    return found + _tasks(tail(logs / "srun.log"))


def failed(log: Path) -> bool:
    """Whether torchrun has seen a rank fail: it ends the others then, unless a signal to itself is the reason. It names
    the rank only after they have left."""
    said = tail(log)
    return "failed (exitcode:" in said or ("closing signal" in said and "death signal" not in said)


def traceback_of(log: Path) -> str:
    """The last traceback in a log; empty without one."""
    lines = tail(log).splitlines()
    starts = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if not starts:
        return ""
    end = starts[-1] + 1
    while end < len(lines) and lines[end].startswith((" ", "\t")):
        end += 1
    return "\n".join(lines[starts[-1] : end + 1])


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The last lines of a log that say something."""
    return [line for line in tail(log).splitlines() if line.strip()][-count:]


def steps_done(logs: Path) -> int:
    """The steps that the farthest rank had done, as the heartbeats tell."""
    return max((beat.step for beat in heartbeat.read_all(logs).values()), default=0)


def newest_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint with a right manifest and all files in full length; their content is not read."""
    for path in manifests.generations(folder / "checkpoints"):
        try:
            manifest = manifests.read(path)
            manifests.check_names(path, manifest)
            if all((path / name).stat().st_size == facts["size"] for name, facts in manifest.files.items()):
                return manifest.step
        except (manifests.Damaged, OSError):
            continue
    return None


def _tasks(said: str) -> list[Death]:
    """The same in srun's words, where srun started every rank: `srun: error: n2: tasks 1,3: Killed`. The first line counts:
    the others tell whom srun ended on account of it."""
    line = re.search(r"srun: error: ([^:\s]+): tasks? ([\d,-]+): (?:Exited with exit code (\d+)|([A-Z][a-z ]+))", said)
    if line is None or (line[3] is None and line[4].strip() not in KILLED):
        return []
    number = int(line[3]) if line[3] else -KILLED[line[4].strip()]
    spans = [span.partition("-")[::2] for span in line[2].split(",")]
    ranks = [rank for low, high in spans for rank in range(int(low), int(high or low) + 1)]
    return [Death(rank, line[1], number, first=True) for rank in ranks]


def _table(text: str) -> list[dict[str, Any]]:
    pattern = r"host\s*: (\S*)\s+rank\s*: (\d+).*?\s+exitcode\s*: (-?\d+)"
    return [{"host": host, "rank": int(rank), "code": int(code)} for host, rank, code in re.findall(pattern, text)]


def tail(path: Path) -> str:
    """The end of a log; empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
