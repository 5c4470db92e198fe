"""The verb that tries this machine: checks, and drills."""

from __future__ import annotations

import json as json_format
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launch.verbs.options import Json, Runs
from trainer.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, GPUs, all-reduce, clocks, disk, locks, compiler. `--drill` drills it.

    Exit code 0 if nothing failed, 69 if something did; warnings do not count. `--node` makes the checks that a job can
    make on every node before it starts: seconds, no torch. `--drill soak` kills, corrupts and starves a small run at
    random, which must end as if nothing had been: two CPU cores and some seconds per fault.
    """

    OVERRIDES: ClassVar[bool] = False
    node: bool = False
    """Only the quick checks."""
    ranks: int | None = None
    """Local ranks of the all-reduce; none takes one per GPU, or two."""
    runs: Runs = Path("runs")
    drill: Literal["none", "soak"] = "none"
    """Which drill, instead of checks."""
    faults: int = 20
    """How many faults."""
    seed: int = 0
    """Which ones: the same seed strikes the same."""
    folder: Path | None = None
    """Where the runs of the drill lie, a new folder; none makes a temporary one, which stays."""
    json: Json = False

    def __call__(self, overrides: list[str]) -> int:
        return self.examine() if self.drill == "none" else self.soak()

    def examine(self) -> int:
        """Print what each check finds, as it comes."""
        from launch import doctor

        findings = []
        for finding in doctor.examine(self.runs, self.ranks, self.node):
            findings.append(finding)
            if not self.json:
                print(f"{finding.result:8} {finding.check:14} {finding.detail}", flush=True)
                if finding.mend:
                    print(f"{'':8} {'mend:':>14} {finding.mend}", flush=True)
        found = doctor.record(findings)
        if self.json:
            print(json_format.dumps(found))
        return Outcome.INFRASTRUCTURE.code if found["result"] == "failure" else 0

    def soak(self) -> int:
        """Run the drill."""
        from launch.drill import soak

        folder = self.folder or Path(tempfile.mkdtemp(prefix="orthogon-soak-")) / "drill"
        began = time.monotonic()

        def say(text: str) -> None:
            if not self.json:
                print(f"[{time.monotonic() - began:6.0f} s] {text}", flush=True)

        report = soak(folder, self.faults, self.seed, say)
        if self.json:
            print(json_format.dumps(report))
            return 0
        for kind, number in sorted(report["faults"].items()):
            print(f"  {kind:16}{number:5}")
        print(
            f"{report['injected']} faults in {report['attempts']} attempts survived; {report['lost_steps']} steps were trained "
            f"again; weights, moments and history are bit-identical to the calm run's"
        )
        return 0
