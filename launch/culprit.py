"""Which rank went first, judged from what an attempt left; a pure function that says "unknown" rather than guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.evidence import Death
from trainer.guard.heartbeat import Beat
from trainer.outcome import Outcome

SILENT_SECONDS = 5.0
"""A sign of life (there are two a second) that is older than the others' by more tells of a process that was stopped, or
dead."""
GONE = "parent is gone"
LINE = 150


@dataclass(frozen=True)
class Culprit:
    """Who was first, and how that is known."""

    rank: int | None
    what: str
    """A sentence without its subject's phase, e.g. "rank 1 was killed by SIGKILL"."""


def culprit(
    outcome: Mapping[str, Any],
    beats: Mapping[int, Beat],
    hangs: Mapping[int, Mapping[str, Any]],
    deaths: Sequence[Death],
) -> Culprit | None:
    """The first rank that failed; None where all ranks left in order, or where nothing tells it.

    Args:
        outcome: the record of the attempt; beats, hangs, deaths: by rank, as `launch.evidence` reads them.
    """
    kind = Outcome(outcome["outcome"])
    if kind.orderly:
        return None
    killed = sorted((death for death in deaths if death.signal), key=lambda death: not death.first)
    if killed:
        where = f" on {killed[0].host}" if killed[0].host not in ("", "localhost") else ""
        return Culprit(killed[0].rank, f"rank {killed[0].rank}{where} was killed by {killed[0].signal}")
    if kind is not Outcome.INFRASTRUCTURE and "rank" in outcome:
        return Culprit(outcome["rank"], f"rank {outcome['rank']} ended with: {first_line(outcome['message'])}")
    stuck = {rank: note for rank, note in hangs.items() if note.get("why") != GONE}
    if stuck:
        return hung(beats, stuck)
    ended = str(outcome.get("ended", ""))
    if ended.startswith("node ") and ended.endswith(" is gone"):
        return Culprit(None, f"{ended}: its supervisor gave no sign of life any more")
    orphans = sorted(rank for rank, note in hangs.items() if note.get("why") == GONE)
    if orphans:
        host = beats[orphans[0]].host if orphans[0] in beats else "its node"
        return Culprit(None, f"torchrun on {host} was killed; {ranks(orphans)} noticed and left")
    quiet = silent(beats)
    return (
        Culprit(quiet, f"rank {quiet} gave no sign of life any more, before the others ended")
        if quiet is not None
        else None
    )


def hung(beats: Mapping[int, Beat], stuck: Mapping[int, Mapping[str, Any]]) -> Culprit | None:
    """Whom the others waited for."""
    quiet = silent(beats)
    if quiet is not None:
        return Culprit(quiet, f"rank {quiet} was stopped or dead: it gave no sign of life while the others did")
    busy = [rank for rank, note in stuck.items() if note.get("waiting") is False]
    if len(busy) == 1:
        frame = stuck[busy[0]].get("frame") or "an unknown place"
        return Culprit(busy[0], f"rank {busy[0]} was at {frame} while the others waited in a collective" if len(stuck) > 1
                       else f"rank {busy[0]} made no progress at {frame}")  # fmt: skip
    fewest = min((beat.beats for beat in beats.values()), default=0)
    behind = [rank for rank, beat in beats.items() if beat.beats == fewest]
    if len(beats) > 1 and len(behind) == 1:
        return Culprit(behind[0], f"rank {behind[0]} was behind the others, in phase '{beats[behind[0]].phase}'")
    return None


def silent(beats: Mapping[int, Beat]) -> int | None:
    """The rank whose sign of life is much older than the newest, the oldest of several; None if there is none."""
    if not beats:
        return None
    newest = max(beat.alive for beat in beats.values())
    oldest = min(beats, key=lambda rank: beats[rank].alive)
    return oldest if newest - beats[oldest].alive > SILENT_SECONDS else None


def first_line(message: str) -> str:
    """The first line of a message for people, not too long: gloo tells stories."""
    line = (message.splitlines() or [""])[0].removeprefix("error: ")
    return line if len(line) <= LINE else line[: LINE - 4] + " ..."


def ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1`."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
