"""Two nodes lose a process, a node, their cable: each time the run stops, goes on with whom it can, and finishes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.nodes import ADDRESSES, Pair, reason_not_to
from tests.dist.conftest import TINY
from trainer import config as configuration
from trainer import runfolder
from trainer.guard import heartbeat

REASON = reason_not_to()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]
STEPS, HANG_SECONDS = 120, 15


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    lines = [f"Line {i} tells of {i * i} things, of {i % 7} days and of {i % 5} seas." for i in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(lines))
    calm = TINY.replace(
        'evaluate: {{every: 5 steps, tokens: 6, prompts: ["the sea", "of"]}}', "evaluate: {{every: 1000 steps}}"
    )
    text = calm.format(folder=folder).replace("ranks: 2", "ranks: 1").replace("20 steps", f"{STEPS} steps")
    (folder / "run.yaml").write_text(
        text + f"guard: {{hang_timeout: {HANG_SECONDS} s, stop_timeout: 20 s}}\nfinish: {{export: false}}\n"
    )
    return folder


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as both:
        yield both


def wait_for(what: Callable[[], object], seconds: float, hint: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, hint()
        time.sleep(0.1)


class Served:
    """A run that both nodes serve."""

    def __init__(self, place: Path, pair: Pair, name: str) -> None:
        self.folder, self.pair = place / "runs" / name, pair
        runfolder.create(configuration.load(place / "run.yaml", [f"--name={name}"]), [])
        self.logs = {host: place / f"{name}-{host}.log" for host in ADDRESSES}
        for host in ADDRESSES:
            pair.start(
                host, self.logs[host], sys.executable, "-m", "launch.cli", "node", name, f"--runs={place}/runs",
                "--hosts=n1,n2", f"--host={host}", "--address-of", *(f"{n}={a}" for n, a in ADDRESSES.items()),
            )  # fmt: skip
        wait_for(self.trains, 300, self.said)

    def trains(self) -> bool:
        """Both ranks have passed step 6, and there is a checkpoint."""
        beats = heartbeat.read_all(self.folder / "logs/1").values()
        return len(beats) == 2 and all(beat.step > 6 for beat in beats) and any(self.folder.glob("checkpoints/step-*5"))

    def said(self) -> str:
        return "\n".join(f"{host}: {log.read_text()}" for host, log in self.logs.items())

    def attempt(self, number: int) -> dict:
        return json.loads((self.folder / f"logs/{number}/attempt.json").read_text())

    def members(self, number: int) -> list[str]:
        return json.loads((self.folder / f"logs/{number}/plan.json").read_text())["members"]

    def stops_within(self, seconds: float) -> None:
        path = self.folder / "logs/1/attempt.json"
        wait_for(path.exists, seconds, self.said)

    def ends(self, *hosts: str) -> None:
        """The supervisors of these hosts end with the finished run, whose data order is that of a calm one."""
        for host in hosts:
            assert self.pair.running[host].wait(600) == 0, self.said()
        assert self.attempt(2)["outcome"] == "finished"
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        trained = [row for row in rows if "loss" in row]
        assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
        assert [row["position"] for row in trained] == list(range(8, 8 * STEPS + 1, 8))


def test_an_agent_is_killed_and_both_nodes_go_on(place, pair) -> None:
    run = Served(place, pair, "agent")
    pair.kill_agent("n2")
    run.stops_within(60)
    assert run.attempt(1)["outcome"] == "infrastructure"
    run.ends("n1", "n2")
    assert run.members(2) == ["n1", "n2"]


def test_the_node_that_hosts_the_rendezvous_is_killed_and_the_other_goes_on(place, pair) -> None:
    run = Served(place, pair, "power")
    pair.kill("n1")
    run.stops_within(60)
    assert (run.attempt(1)["outcome"], run.attempt(1)["ended"]) == ("infrastructure", "node n1 is gone")
    run.ends("n2")
    assert run.members(2) == ["n2"]


def test_the_cable_is_cut_and_the_leader_goes_on_alone(place, pair) -> None:
    run = Served(place, pair, "cable")
    pair.cut()
    run.stops_within(HANG_SECONDS + 60)
    assert run.attempt(1)["outcome"] == "infrastructure"
    run.ends("n1", "n2")
    assert run.members(2) == ["n1"]
