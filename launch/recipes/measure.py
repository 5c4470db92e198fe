"""Measurements of runs and ensembles on this machine, each made once per checkpoint and kept beside the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch import evidence, warm
from trainer.checkpoint import manifest as manifests
from trainer.ensemble import manifest
from trainer.files import digest, sha256_file, write_json
from trainer.outcome import RunError


@dataclass(frozen=True)
class Measure:
    """Where results are kept, and what is told meanwhile."""

    runs: Path
    folder: Path
    say: Callable[[str], None]
    tasks: Sequence[str] = ()
    """Multiple-choice tasks that are asked, too."""

    def command(self, *words: str) -> str:
        """What a command of ours prints.

        Raises:
            RunError: it failed; with its last words.
        """
        done = warm.command(list(words))
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            raise RunError(
                f"orthogon {' '.join(words)} ended with exit code {done.returncode}: {last[0]}",
                where=words[0],
                mend="run this command alone to see all of it; the recipe goes on where it was",
            )
        return done.stdout

    def answer(self, *words: str) -> Any:
        """The JSON value that a command of ours prints.

        Raises:
            RunError: it failed, or gave none.
        """
        for line in reversed(self.command(*words).splitlines()):
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise RunError(f"orthogon {' '.join(words)} gave no JSON", where=words[0], mend="run this command alone")

    def kept(self, name: str, facts: dict[str, Any], make: Callable[[], Any]) -> Any:
        """A result that was made of these facts before, or is made now."""
        path, key = self.folder / "measurements" / f"{name}.json", digest(facts)
        record = evidence.record(path) or {}
        if record.get("key") != key:
            record = {"key": key, "found": make()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
        return record["found"]

    def run(self, name: str, split: str) -> dict[str, Any]:
        """`orthogon evaluate` of a run's newest checkpoint."""
        folder = self.runs / name
        step = evidence.newest_checkpoint(folder)
        if step is None:
            raise RunError(f"run {name} has no checkpoint", where=str(folder), mend="train it again")
        facts = {"checkpoint": sha256_file(manifests.find(folder, step) / "manifest.json"), "split": split}
        words = ("evaluate", name, "--split", split, "--json", "--runs", str(self.runs), *self._asked(facts))
        found: dict[str, Any] = self.kept(f"{name}-{split}", facts, partial(self.answer, *words))
        return found

    def ensemble(self, name: str, split: str) -> dict[str, Any]:
        """`orthogon ensemble evaluate` of an ensemble and its subsets."""
        members = [member.manifest_sha256 for member in manifest.read(self.runs, name).members]
        facts = {"members": members, "split": split}
        asked = self._asked(facts)
        words = ("ensemble", "evaluate", name, "--split", split, "--json", "--runs", str(self.runs))
        found: dict[str, Any] = self.kept(f"ensemble-{name}-{split}", facts, partial(self.answer, *words, *asked))
        return found

    def _asked(self, facts: dict[str, Any]) -> list[str]:
        """The words that ask for the tasks, whose content joins the facts."""
        if self.tasks:
            facts["tasks"] = {task: sha256_file(Path(task)) for task in self.tasks}
        return ["--tasks", *self.tasks] if self.tasks else []

    def all_runs(self, names: list[str], split: str, at_once: int) -> dict[str, dict[str, Any]]:
        """Several runs, so many at a time."""

        def one(name: str) -> dict[str, Any]:
            found = self.run(name, split)
            self.say(f"{name}: {split} loss {found[split]['loss']:.4f}")
            return found

        with ThreadPoolExecutor(max(at_once, 1)) as pool:
            try:
                return dict(zip(names, pool.map(one, names), strict=True))
            except BaseException:  # Ctrl-C reaches this thread alone
                pool.shutdown(wait=False, cancel_futures=True)
                warm.end_commands()
                raise
