"""The verb pipeline."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from launch.verbs.options import Cluster, On
from trainer.outcome import RunError


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Run a graph of runs and commands, each when those before it are done.

    The same command goes on after an interruption: what is done is skipped, what was interrupted is resumed. What fails stops
    only what comes after it. See docs/launch.md for the graph's file; options of the backend stand beside, as in submit.
    """

    OVERRIDES: ClassVar[bool] = True
    graph: Annotated[Positional[Path], arg(metavar="GRAPH")]
    """The YAML file of the graph."""
    on: On = None
    cluster: Cluster = None
    at_once: int = 1
    """Nodes that run at the same time."""
    queue: bool = False
    """Give all runs to the backend at once, which lets them wait for each other, and return."""
    dry_run: bool = False
    """Print the nodes in order and start nothing."""

    def __call__(self, overrides: list[str]) -> int:
        from launch.choices import choose
        from launch.graph import read
        from launch.pipeline import Driver, drive, queue

        on, options, rest = choose(self.on, self.cluster, overrides)
        if rest:
            raise RunError(f"'{rest[0]}' is not understood", where="command line", mend="set it in the graph's file")
        if self.at_once < 1:
            raise RunError("--at-once is below one", where="command line, --at-once", mend="give a number above zero")
        graph = read(self.graph)
        if self.dry_run:
            for name, node in graph.nodes.items():
                what = " ".join(node.command) if node.config is None else f"run {node.config.folder}"
                print(f"{name}: {what}" + (f", after {', '.join(node.after)}" if node.after else ""))
            return 0
        driver = Driver(graph, on, options, say=lambda text: print(text, flush=True))
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # as Ctrl-C: commands end, runs in the background go on
        return queue(driver) if self.queue else drive(driver, self.at_once)
