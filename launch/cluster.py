"""The supervisor of one node of several: joins attempts, leads them if it is this host's turn, ends with the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import attempt, children, evidence, nodes, retry
from launch.backends import torchrun
from launch.supervisor import restart_line
from trainer import runfolder
from trainer.files import write_json
from trainer.outcome import Outcome, RunError

if TYPE_CHECKING:
    from trainer.config import RunConfig

START_SECONDS = 300.0
"""How long the first attempt waits for hosts that have not come up."""
PEER_SECONDS = 20.0
"""What torchrun gets to end by itself after it ended on another node."""
TICK = 0.1


@dataclass
class Node:
    """One node's supervisor."""

    config: RunConfig
    folder: Path
    nodes: nodes.Nodes
    address: str
    """How the others reach this host."""
    bind: str
    restarts: int
    asked: children.Asked
    began: int
    """The newest attempt when this supervisor started: later ones are its own and its peers'."""
    started: float = field(default_factory=time.monotonic)
    not_before: float = 0.0
    start_step: int = 0

    @property
    def host(self) -> str:
        return self.nodes.mine.host

    def logs(self, number: int) -> Path:
        return self.folder / "logs" / str(number)


def supervise(
    config: RunConfig, folder: Path, hosts: Sequence[str], host: str, addresses: dict[str, str], restarts: int
) -> tuple[dict[str, Any], bool]:
    """Serve a run on this host until it ends for good.

    Returns:
        The record of the last attempt (`launch/attempt.py`), and whether this host led it.
    """
    known = evidence.attempts(folder)
    with children.Asked() as asked:
        node = Node(
            config, folder, nodes.Nodes(folder, hosts, host), addresses.get(host, host), addresses.get(host, ""),
            restarts, asked, known[-1] if known else 0, start_step=evidence.newest_checkpoint(folder) or 0,
        )  # fmt: skip
        node.nodes.beat(done=node.began)
        try:
            while (end := step(node)) is None:
                time.sleep(TICK)
            return end, end["led_by"] == host
        finally:
            node.nodes.leave()


def step(node: Node) -> dict[str, Any] | None:
    """Whatever is to be done now; the record of the last attempt once the run has ended."""
    note_signal(node)
    end = evidence.record(node.folder / "nodes" / "end.json")
    if end is not None and end["attempt"] > node.began:
        return end
    plan = node.nodes.plan()
    if plan is not None and plan.attempt > node.nodes.mine.done and node.host in plan.members:
        run(node, plan)
        return None
    number = max([node.nodes.mine.done, plan.attempt if plan else 0, *evidence.attempts(node.folder)])
    if node.nodes.leads():
        return lead(node, number, plan if plan and plan.attempt == number else None)
    offered = node.nodes.offered(above=max(node.nodes.mine.done, plan.attempt if plan else 0))
    if offered is not None:
        nodes.join(offered, node.host)
    return None


def note_signal(node: Node) -> None:
    """Keep the sign of life fresh, and tell the others once that the end is asked for."""
    told = node.asked.signal is not None and not node.nodes.mine.asked
    node.nodes.beat(**({"asked": True} if told else {}))


def run(node: Node, plan: nodes.Plan) -> None:
    """This node's part of an attempt."""
    name = f"torchrun-{node.host}.log"
    environment = torchrun.variables(node.config)
    interface = nodes.interface_of(node.address)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    line = torchrun.attempt_command(node.config, node.folder, plan.attempt, plan.torchrun(node.host))
    node.nodes.beat(running=plan.attempt, ended="")
    begun, left = time.monotonic(), dict[str, float]()

    def gone() -> str:
        note_signal(node)
        return peer_gone(node, plan, begun, left)

    node.logs(plan.attempt).mkdir(exist_ok=True)
    with open(node.logs(plan.attempt) / name, "w", encoding="utf-8") as log:
        child = children.start(line, log, environment)
        try:
            ended = attempt.watch(child, node.logs(plan.attempt), name, node.asked, gone)
        except BaseException:
            children.end(child)
            raise
    node.nodes.beat(running=0, done=plan.attempt, ended=ended)


def peer_gone(node: Node, plan: nodes.Plan, begun: float, left: dict[str, float]) -> str:
    """Why this node's part of an attempt cannot go on, or empty.

    Args:
        begun: when it began.
        left: when torchrun was first seen to have ended on another node; kept from call to call.
    """
    living, now = node.nodes.living(), time.monotonic()
    for host in plan.members:
        if host not in living and now - begun > nodes.STALE_SECONDS:
            return f"node {host} is gone"
        sign = node.nodes.signs.get(host)
        if sign is not None and host != node.host and sign.done >= plan.attempt:
            left.setdefault(host, now)
        if now - left.get(host, now) > PEER_SECONDS:
            return f"torchrun ended on node {host}"
    newest = node.nodes.plan()
    if node.nodes.offered(above=plan.attempt) or (newest is not None and newest.attempt > plan.attempt):
        return "the next attempt has begun"
    return ""


def lead(node: Node, number: int, plan: nodes.Plan | None) -> dict[str, Any] | None:
    """Begin the next attempt, or end the run, once nobody works on the last one any more."""
    living = node.nodes.living()
    signs = [node.nodes.signs[host] for host in living]
    if any(sign.running for sign in signs):
        return None
    asked = any(sign.asked for sign in signs)
    if number > node.began:
        if plan is not None and any(sign.done < number for sign in signs if sign.host in plan.members):
            return None  # it has read no plan yet, and will
        record = evidence.record(node.logs(number) / attempt.FILE) or closed(node, number, plan, living, asked)
        decision = judge(node, asked or record["asked"])
        if isinstance(decision, retry.Stop):
            print(f"no further attempt: {decision.why}", flush=True)
            return end_all(node, record)
        if time.monotonic() < node.not_before:
            return None
    elif asked:
        return end_all(node, unstarted(node.folder))
    elif len(living) < len(node.nodes.hosts) and time.monotonic() - node.started < START_SECONDS:
        return None
    try:
        new = runfolder.new_attempt(node.folder)
    except RunError as error:
        if error.outcome is Outcome.INFRASTRUCTURE:
            raise
        return None  # another node was faster
    stop = lambda: node.asked.signal is not None or not node.nodes.leads()  # noqa: E731
    made = nodes.offer(node.nodes, node.logs(new), node.address, node.bind, stop)
    if made is not None:
        without = f"; without {', '.join(made.unreached)}, not reached" if made.unreached else ""
        print(f"attempt {new} on {', '.join(made.members)}{without}", flush=True)
    return None


def closed(node: Node, number: int, plan: nodes.Plan | None, living: list[str], asked: bool) -> dict[str, Any]:
    """The record of the last attempt, now that it has ended on all nodes that live; says what follows."""
    lost = [f"node {host} is gone" for host in (plan.members if plan else []) if host not in living]
    whys = [sign.ended for sign in node.nodes.signs.values() if sign.host in living and sign.done == number]
    node.logs(number).mkdir(exist_ok=True)
    began = plan.time if plan else time.time()
    record = attempt.close(node.folder, number, asked, began, next(filter(None, [*lost, *whys]), ""))
    decision = judge(node, asked)
    if isinstance(decision, retry.Again):
        node.not_before = time.monotonic() + decision.seconds
        print(restart_line(record, decision), flush=True)
        runfolder.record_event(node.folder, "restart", attempt=number, outcome=record["outcome"], why=decision.why)
    return record


def judge(node: Node, asked: bool) -> retry.Again | retry.Stop:
    """What follows the attempts since this supervisor started; they are read from their files, as leaders change."""
    records = [
        evidence.record(node.logs(number) / attempt.FILE)
        for number in evidence.attempts(node.folder)
        if number > node.began
    ]
    past = [attempt.for_retry(node.folder, record) for record in records if record is not None]
    return retry.decide([*past[:-1], replace(past[-1], asked=past[-1].asked or asked)], node.start_step, node.restarts)


def unstarted(folder: Path) -> dict[str, Any]:
    """The record of an attempt that was asked to end before any node worked on it."""
    number = runfolder.new_attempt(folder)
    return attempt.close(folder, number, True, time.time(), "")


def end_all(node: Node, record: dict[str, Any]) -> dict[str, Any]:
    """Tell all supervisors that the run has ended."""
    end = {**record, "led_by": node.host}
    write_json(node.folder / "nodes" / "end.json", end)
    return end
