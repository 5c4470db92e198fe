"""Signs of life, leaders and plans of several nodes, without processes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from launch import cluster, nodes
from launch.nodes import Nodes, Plan


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that `launch.nodes` and `launch.cluster` see."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def turn(clock: list[float], *all_nodes: Nodes, seconds: float = 1.0) -> None:
    clock[0] += seconds
    for one in all_nodes:
        one.beat()


def test_a_sign_counts_while_it_changes_and_an_old_file_does_not(tmp_path, clock) -> None:
    first = Nodes(tmp_path, ["n1", "n2"], "n1")
    (tmp_path / "nodes/n2.json").write_text(json.dumps({"host": "n2", "started": 1.0, "count": 7}))
    turn(clock, first)
    turn(clock, first)
    assert first.living() == ["n1"]  # left behind by a supervisor of before
    second = Nodes(tmp_path, ["n1", "n2"], "n2")
    turn(clock, second, first)
    assert first.living() == ["n1", "n2"]
    for _ in range(9):
        turn(clock, first)
    assert first.living() == ["n1", "n2"]
    turn(clock, first)
    assert first.living() == ["n1"]
    turn(clock, second, first)
    assert first.living() == ["n1", "n2"]


def test_the_first_living_host_leads_and_a_later_one_looks_long_enough_before(tmp_path, clock) -> None:
    first, second = (Nodes(tmp_path, ["n1", "n2"], host) for host in ("n1", "n2"))
    turn(clock, second)
    assert not second.leads()  # n1 may be there
    turn(clock, first, second)
    turn(clock, first, second)
    assert (first.leads(), second.leads()) == (True, False)
    for _ in range(11):
        turn(clock, second)
    assert second.leads()
    turn(clock, first, second)
    turn(clock, first, second)
    assert (first.leads(), second.leads()) == (True, False)


def test_changes_are_written_at_once(tmp_path, clock) -> None:
    first, second = (Nodes(tmp_path, ["n1", "n2"], host) for host in ("n1", "n2"))
    turn(clock, first, second)
    first.beat(running=3)
    turn(clock, second)
    assert second.signs["n1"].running == 3


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Nodes, Nodes]:
    """Two nodes that know of each other, and the folder of an attempt."""
    logs = tmp_path / "logs/4"
    logs.mkdir(parents=True)
    first, second = (Nodes(tmp_path, ["n1", "n2"], host) for host in ("n1", "n2"))
    for _ in range(3):
        for one in (first, second):
            one.beat(ended="")
    return logs, first, second


def test_who_connects_is_in_the_plan(pair) -> None:
    logs, first, second = pair
    made, last = list[Plan | None](), {"address": "127.0.0.1", "port": 9}
    leader = threading.Thread(
        target=lambda: made.append(nodes.offer(first, logs, "127.0.0.1", "127.0.0.1", lambda: False))
    )
    leader.start()
    while second.plan() is None:
        second.beat(ended="")
        last = second.offered(above=3) or last
        nodes.join(last, "n2")
        leader.join(0.01)
    leader.join()
    plan = second.plan()
    assert plan == made[0]
    assert plan == Plan(**json.loads((logs / "plan.json").read_text()))
    assert (plan.attempt, plan.members, plan.unreached, plan.address) == (4, ["n1", "n2"], [], "127.0.0.1")
    assert plan.torchrun("n2") == (
        "--nnodes=2", "--node-rank=1", f"--rdzv-id={plan.id}", "--master-addr=127.0.0.1", f"--master-port={plan.port}",
    )  # fmt: skip
    assert second.offered(above=3) is None
    assert not nodes.join(last, "n2")  # the port is closed again


def test_who_lives_and_does_not_connect_is_left_out(pair, monkeypatch) -> None:
    logs, first, _ = pair
    monkeypatch.setattr(nodes, "WINDOW_SECONDS", 0.3)
    plan = nodes.offer(first, logs, "127.0.0.1", "127.0.0.1", lambda: False)
    assert plan is not None
    assert (plan.members, plan.unreached) == (["n1"], ["n2"])


def test_a_stranger_is_not_let_in(pair, monkeypatch) -> None:
    logs, first, second = pair
    monkeypatch.setattr(nodes, "WINDOW_SECONDS", 1.0)
    made: list[Plan | None] = []
    leader = threading.Thread(
        target=lambda: made.append(nodes.offer(first, logs, "127.0.0.1", "127.0.0.1", lambda: False))
    )
    leader.start()
    while leader.is_alive():
        second.beat(ended="")
        offered = second.offered(above=3)
        if offered is not None:
            assert not nodes.join({**offered, "id": "0" * 16}, "n2")
        leader.join(0.05)
    assert made[0] is not None
    assert made[0].members == ["n1"]


def test_an_offer_ends_when_it_is_told_to(pair) -> None:
    logs, first, _ = pair
    assert nodes.offer(first, logs, "127.0.0.1", "127.0.0.1", lambda: True) is None
    assert first.plan() is None
    assert first.offered(above=0) is None


def test_the_interface_of_an_address(pair) -> None:
    assert nodes.interface_of("127.0.0.1") == "lo"
    assert nodes.interface_of("203.0.113.7") is None


def test_a_member_stops_for_a_lost_peer_for_an_ended_one_and_for_a_newer_attempt(tmp_path, clock) -> None:
    (tmp_path / "logs/4").mkdir(parents=True)
    first, second = (Nodes(tmp_path, ["n1", "n2"], host) for host in ("n1", "n2"))
    node = cluster.Node(None, tmp_path, first, "", "", 3, None, 0)  # type: ignore[arg-type]
    plan, left = Plan(4, "x", ["n1", "n2"], "a", 1), dict[str, float]()
    for _ in range(3):
        turn(clock, first, second)
    begun = clock[0]
    assert cluster.peer_gone(node, plan, begun, left) == ""
    second.beat(done=4)
    turn(clock, first)
    assert cluster.peer_gone(node, plan, begun, left) == ""
    for _ in range(21):
        turn(clock, second, first)
    assert cluster.peer_gone(node, plan, begun, left) == "torchrun ended on node n2"
    for _ in range(11):
        turn(clock, first)
    assert cluster.peer_gone(node, plan, begun, left) == "node n2 is gone"
    turn(clock, second, first)
    second.beat(offer={"attempt": 5})
    turn(clock, first)
    assert cluster.peer_gone(node, plan, begun, {}) == "the next attempt has begun"
