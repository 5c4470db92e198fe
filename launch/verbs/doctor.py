"""The verb that tries this machine: drills."""

from __future__ import annotations

import json as json_format
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launch.verbs.options import Json


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Drill this machine: a small run is struck at random and must end as if nothing had been.

    `soak` needs two CPU cores and some seconds per fault. It makes its own text and starts only processes of its own.
    """

    OVERRIDES: ClassVar[bool] = False
    drill: Literal["soak"]
    """Which drill."""
    faults: int = 20
    """How many faults."""
    seed: int = 0
    """Which ones: the same seed strikes the same."""
    folder: Path | None = None
    """Where the runs of the drill lie, a new folder; none makes a temporary one, which stays."""
    json: Json = False

    def __call__(self, overrides: list[str]) -> int:
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
