"""The verbs of `orthogon`: one registry, one file per family.

A verb is a frozen dataclass: its docstring is its help (the first line stands in `orthogon --help`), its fields are its
options, and calling it with the overrides does the work and returns the exit code. `OVERRIDES` says that it takes
`--section.key=value`. Only the file of the verb that is asked for is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

VERBS = {
    "run": "runs:Run",
    "resume": "runs:Resume",
    "submit": "submit:Submit",
    "pipeline": "pipeline:Pipeline",
    "list": "listing:List",
    "status": "watch:Status",
    "logs": "watch:Logs",
    "cancel": "watch:Cancel",
    "node": "node:Node",
    "plan": "plan:Plan",
    "report": "report:Report",
    "branch": "branch:Branch",
    "diff": "diff:Diff",
    "evaluate": "evaluate:Evaluate",
    "generate": "generate:Generate",
    "ensemble train": "ensemble:Train",
    "ensemble make": "ensemble:Make",
    "ensemble evaluate": "ensemble:Evaluate",
    "tune": "tune:Tune",
    "recipe run": "recipe:Run",
    "ensemble generate": "generate:GenerateEnsemble",
    "ensemble sample": "distill_text:Sample",
    "distill text": "distill_text:Text",
    "distill cache": "distill:Cache",
    "distill logits": "distill:Logits",
    "checkpoint list": "checkpoint:List",
    "checkpoint verify": "checkpoint:Verify",
    "checkpoint export": "checkpoint:Export",
    "checkpoint average": "checkpoint:Average",
    "laws fit": "laws:Fit",
    "doctor": "doctor:Doctor",
    "data prepare": "data:Prepare",
    "data verify": "data:Verify",
}


def find(name: str) -> Any:
    """The class of a verb."""
    module, _, attribute = VERBS[name].partition(":")
    return getattr(import_module(f"launch.verbs.{module}"), attribute)
