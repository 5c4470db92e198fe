"""What `orthogon list` takes from start to end, with 200 and 1,000 runs in the ledger.

    python benchmarks/cli_start.py [--runs 200 1000] [--rounds 15]

Makes run folders as finished runs leave them, of which some are alive, in a temporary place with a ledger of its own, and
starts the command anew each time, in alternation with an interpreter that does nothing. Output goes to a pipe, and to a
terminal (which loads rich). Prints medians with minimum and maximum, in seconds, and the processor time of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch import handles  # noqa: E402
from trainer.guard.heartbeat import Heartbeat  # noqa: E402
from trainer.outcome import Outcome, write_outcome  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{'':44}  median   least    most  processor")
    for count in arguments.runs:
        for alive in (5, count):
            with tempfile.TemporaryDirectory() as place:
                os.environ |= {"ORTHOGON_STATE": f"{place}/state", "PYTHONPATH": str(ROOT)}
                make(Path(place) / "runs", count, alive)
                command = [sys.executable, "-m", "launch.cli", "list"]
                subprocess.run([*command, "--rebuild", f"--runs={place}/runs"], check=True, capture_output=True)
                cases = {
                    "python -c pass": ([sys.executable, "-c", "pass"], False),
                    f"list, {count} runs, {alive} alive": (command, False),
                    f"list, {count} runs, {alive} alive, terminal": (command, True),
                }
                seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
                for _ in range(arguments.rounds):
                    for name, (line, terminal) in cases.items():
                        seconds[name].append(timed(line, terminal))
                for name, pairs in seconds.items():
                    wall, work = zip(*pairs, strict=True)
                    print(
                        f"{name:44}  {statistics.median(wall):6.3f}  {min(wall):6.3f}  {max(wall):6.3f}  {statistics.median(work):9.3f}"
                    )


def timed(line: list[str], terminal: bool) -> tuple[float, float]:
    """Wall and processor seconds of a command, from its start to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    if terminal:
        ours, theirs = pty.openpty()
        child = subprocess.Popen(line, stdout=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"})
        os.close(theirs)
        while True:
            try:
                if not os.read(ours, 1 << 16):
                    break
            except OSError:  # the other end is closed
                break
        child.wait()
        os.close(ours)
    else:
        child = subprocess.Popen(line, stdout=subprocess.PIPE)
        child.communicate()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.returncode == 0
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make(runs: Path, count: int, alive: int) -> None:
    """Run folders as their files are after 200 steps; of those that are alive this process is the launcher."""
    for number in range(count):
        folder = runs / f"run-{number:04}"
        logs = folder / "logs" / "1"
        logs.mkdir(parents=True)
        (folder / "config.yaml").write_text("train:\n  length: 400 steps\n")
        (folder / "run.json").write_text(
            json.dumps({"name": folder.name, "created": time.time() - number, "lineage": {}})
        )
        steps = [
            {"step": step, "loss": 4.0 - step / 100, "tokens_per_second": 1e5, "seconds": 0.1} for step in range(1, 201)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        events = [
            {"time": 0, "event": "planned", "steps": 400},
            *({"event": "saved", "step": s} for s in range(0, 200, 10)),
        ]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if number < alive:
            Heartbeat(logs / "heartbeat-0").beat("step", 200)
            record = {"backend": "torchrun", "options": {}, "attempts": 0, **handles.identity()}
            (folder / handles.FILE).write_text(json.dumps(record))
        else:
            write_outcome(logs, Outcome.FINISHED, "all 400 steps are trained and saved")
            record = json.loads((logs / "outcome.json").read_text())
            (logs / "attempt.json").write_text(json.dumps({**record, "attempt": 1, "checkpoint": 400, "seconds": 40.0}))


if __name__ == "__main__":
    main()
