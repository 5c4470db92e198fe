"""What Slurm is asked, by its commands, and how its answers are read: by squeue, then sacct, then scontrol, whichever is there.

Commands are found by PATH. Their answers are read by columns that are asked for by name, never by the width of a table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.slurm.environment import of_submission
from trainer.outcome import Outcome, RunError

PATIENCE_SECONDS = 30.0
PENDING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
    "POWER_UP_NODE",
}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
BAD_NODE = re.compile(r"down|drain|fail|not_resp|error|maint|power|unknown", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    state: str
    """Slurm's own word, e.g. RUNNING."""
    detail: str = ""
    """Why it waits, where it runs, with what code it ended."""

    @property
    def kind(self) -> str:
        """pending, running, ended or unknown."""
        for kind, words in (("pending", PENDING), ("running", RUNNING), ("ended", ENDED)):
            if self.state in words:
                return kind
        return "unknown"


class Silent(RunError):
    """Slurm does not answer."""


def call(name: str, *words: str, seconds: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        Silent: it is not on PATH, does not end, or reaches no controller.
    """
    if shutil.which(name) is None:
        raise Silent(
            f"there is no command {name}",
            where="PATH",
            mend="run this on a login node of the cluster, or `module load slurm`",
        )
    try:
        answer = subprocess.run(
            [name, *words], capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL,
            env=of_submission() | {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _silent(name, f"no answer for {seconds:g} s") from None
    if answer.returncode and re.search(
        r"[Uu]nable to contact|Connection (refused|timed out)|Communication connection failure|Socket timed out",
        answer.stderr,
    ):
        raise _silent(name, complaint(answer))
    return answer


def _silent(name: str, why: str) -> Silent:
    return Silent(
        f"Slurm's controller does not answer: {why}",
        where=name,
        mend="try again in a while; jobs go on without it. `scontrol ping` says which controller is meant",
        outcome=Outcome.INFRASTRUCTURE,
    )


def complaint(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command said against it, in one line."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    text = "; ".join(dict.fromkeys(re.sub(r"^\w+: (error: )?", "", line) for line in lines[:3]))
    return text or f"exit code {answer.returncode}"


def jobs(numbers: Sequence[str]) -> tuple[dict[str, Job], str]:
    """What is known of many jobs, in at most one call of squeue and one of sacct, and one of scontrol per job after these.

    Args:
        numbers: as sbatch gives them; members of an array as `17_2`.

    Returns:
        What was found, and why the controller could not be asked, or "".

    Raises:
        Silent: none of the commands is there.
    """
    found, silence, asked, known = dict[str, Job](), "", False, False
    missing = list(numbers)
    for ask in (_squeue, _sacct, _scontrol):
        if not missing:
            break
        try:
            answers = ask(missing)
        except Silent as error:
            if shutil.which(ask.__name__.strip("_")) is not None:
                asked, silence = True, silence or error.what
            continue
        asked = True
        # Accounting is late, and keeps for ever what a controller lost in a crash: of jobs that are not over it only counts
        # where nobody else can be asked.
        sure = ask is not _sacct or not (known or silence)
        found |= {number: job for number, job in answers.items() if sure or job.kind == "ended"}
        known = known or ask is _squeue
        missing = [number for number in missing if number not in found]
    if not asked:
        raise Silent(
            "there is none of squeue, sacct and scontrol",
            where="PATH",
            mend="run this on a login node of the cluster, or `module load slurm`",
        )
    return found, silence


def _squeue(numbers: Sequence[str]) -> dict[str, Job]:
    # All of a user's jobs: a number that is not known any more makes squeue refuse the whole list.
    answer = call("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N")
    if answer.returncode:
        answer = call("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N")
    return {number: job for number, job in read_squeue(answer.stdout).items() if number in numbers}


def read_squeue(text: str) -> dict[str, Job]:
    """Lines `number|STATE|reason|nodes`."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 4:
            continue
        number, state, reason, nodes = fields
        detail = f"on {nodes}" if nodes else f"waits: {reason}" if reason not in ("", "None") else ""
        found[number] = Job(state_of(state), detail)
    return found


def _sacct(numbers: Sequence[str]) -> dict[str, Job]:
    answer = call(
        "sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(numbers)}",
        "--format=JobID,State,ExitCode,NodeList",
    )  # fmt: skip
    return {} if answer.returncode else {n: job for n, job in read_sacct(answer.stdout).items() if n in numbers}


def read_sacct(text: str) -> dict[str, Job]:
    """Lines `number|STATE|code:signal|nodes`; of several attempts at one job the last line counts."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 4:
            continue
        number, state, code, nodes = fields
        where = f" on {nodes}" if nodes not in ("", "None assigned") else ""
        for one in members(number):
            found[one] = Job(state_of(state), f"{state}, exit code {code}{where}")
    return found


def members(number: str) -> list[str]:
    """The jobs that a row of an array means: `17_[1-3,5%2]` are those that have not started, of which two may run at a time."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", number)
    if match is None:
        return [number]
    spans = [span.partition("-")[::2] for span in match[2].split(",")]
    return [f"{match[1]}_{index}" for low, high in spans for index in range(int(low), int(high or low) + 1)]


def _scontrol(numbers: Sequence[str]) -> dict[str, Job]:
    found = {}
    for number in numbers:
        answer = call("scontrol", "--oneliner", "show", "job", number)
        facts = read_scontrol(answer.stdout)
        if not answer.returncode and "JobState" in facts:
            state = state_of(facts["JobState"])
            found[number] = Job(state, f"{facts['JobState']}, exit code {facts.get('ExitCode', '?')}")
    return found


def read_scontrol(text: str) -> dict[str, str]:
    """The words `Key=Value` of the first line; values with blanks keep their first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", text.splitlines()[0])) if text.strip() else {}


def state_of(word: str) -> str:
    """A state without what may follow it: `CANCELLED by 1000`, `RUNNING+`, `COMPLETED*`."""
    match = re.match(r"[A-Z_]+", word.strip())
    return match[0].rstrip("_") if match else word.strip()


def hostnames(nodelist: str) -> list[str]:
    """A list of nodes as scontrol expands it; empty where it cannot be asked."""
    try:
        answer = call("scontrol", "show", "hostnames", nodelist)
    except Silent:
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


def node_states(partition: str | None = None) -> Mapping[str, str]:
    """The state of every node, as sinfo tells it; empty where it does not."""
    words = [f"--partition={partition}"] if partition else []
    try:
        answer = call("sinfo", "--noheader", "--Node", "--format=%N %T", *words)
    except Silent:
        return {}
    return dict(line.split()[:2] for line in answer.stdout.splitlines() if len(line.split()) >= 2)


def is_bad(state: str) -> bool:
    """Whether a node of this state gets no jobs; a star says that it does not respond."""
    return bool(BAD_NODE.search(state)) or state.endswith("*")
