"""Whether a machine is fit for a run: each check answers ok, warning or failure, with what was found and a mend.

A check never raises: one that cannot find out says so. `NODE` are those that a job can make on every node before it starts:
seconds, no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch import process
from launch.backends import torchrun

MEGABYTES = 32
"""Size of the file that is written and read back."""
PATIENCE = 240.0
"""Seconds that a process with torch gets."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    result: str
    """`ok`, `warning` or `failure`."""
    detail: str
    mend: str = ""


def ok(check: str, detail: str) -> Finding:
    return Finding(check, "ok", detail)


def warning(check: str, detail: str, mend: str) -> Finding:
    return Finding(check, "warning", detail, mend)


def failure(check: str, detail: str, mend: str) -> Finding:
    return Finding(check, "failure", detail, mend)


def examine(runs: Path, ranks: int | None, node: bool) -> Iterator[Finding]:
    """All findings, one after the other as they come.

    Args:
        runs: the folder of runs, which may not be there yet.
        ranks: how many local ranks add up; None takes one per GPU, or two.
        node: only the quick checks of a node.
    """
    for check in (python, versions, gpus, clocks, shared_memory, open_files, slurm):
        yield guarded(check.__name__.replace("_", " "), check)
    for about in (disk, locks):
        yield guarded(about.__name__, lambda about=about: about(runs))  # type: ignore[misc]
    if not node:
        yield from with_torch()
        yield guarded("all-reduce", lambda: all_reduce(ranks))


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A finding, whatever happens."""
    try:
        return check()
    except Exception as error:
        return failure(name, f"the check broke: {type(error).__name__}: {error}", "report this with the machine's kind")


def python() -> Finding:
    found = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  # a wheel may be forced in
        return failure("python", found, "use Python 3.11 or newer")
    return ok("python", f"{found}, {os.cpu_count()} CPUs, {platform.machine()}")


def versions() -> Finding:
    """The packages that results depend on, against the versions that the tests run with, where that list is there."""
    from trainer.runfolder import versions as installed

    found = installed()
    text = ", ".join(f"{name} {version}" for name, version in found.items() if name != "orthogon")
    missing = [name for name in ("torch", "transformers", "datasets", "safetensors") if name not in found]
    if missing:
        return failure("versions", f"not installed: {', '.join(missing)}", "pip install orthogon")
    if tuple(int(part) for part in found["torch"].split(".")[:2]) < (2, 11):
        return failure("versions", text, "torch 2.11 or newer")
    pins = pinned(process.ROOT / "constraints.txt")
    other = [f"{n} {v} (tested: {pins[n]})" for n, v in found.items() if n in pins and v.partition("+")[0] != pins[n]]
    if other:
        return warning("versions", "; ".join(other), "pip install --constraint constraints.txt for the tested ones")
    return ok("versions", text + ("; as tested" if pins else ""))


def pinned(path: Path) -> dict[str, str]:
    """Package -> version of a constraints file; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def asked(*line: str, seconds: float = 5.0) -> subprocess.CompletedProcess[str] | None:
    """What a program says; None where it is not there or does not answer."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def gpus() -> Finding:
    """GPUs by the driver's own tool: names, memory, uncorrected errors."""
    if shutil.which("nvidia-smi") is None:
        present = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if present:
            return warning("gpus", f"{len(present)} device files and no nvidia-smi", "install the driver's tools")
        return ok("gpus", "none")
    fields = "name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    answer = asked("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", seconds=8.0)
    if answer is None or answer.returncode:
        said = "no answer" if answer is None else (answer.stdout + answer.stderr).strip().splitlines()[-1:]
        return failure("gpus", f"nvidia-smi: {said}", "see the kernel's log; leave this node out")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    sick = [index for index, row in enumerate(rows) if row[3].isdigit() and int(row[3])]
    if sick:
        return failure("gpus", f"uncorrected memory errors on GPU {', '.join(map(str, sick))}", "reset or leave it out")
    used = [index for index, row in enumerate(rows) if row[2].isdigit() and int(row[2]) > 2000]
    if used:
        return warning("gpus", f"memory is in use on GPU {', '.join(map(str, used))}", "end what uses it: nvidia-smi")
    return ok("gpus", f"{len(rows)} x {rows[0][0]}, {rows[0][1]} MiB" if rows else "none")


def clocks() -> Finding:
    """The wall clock runs as the monotonic one does, lies in this decade, and is synchronized where that can be known."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.2)
    drift = (time.time() - wall) - (time.monotonic() - steady)
    if abs(drift) > 0.02 or wall < 1.7e9:
        return failure("clocks", f"wall and monotonic clock differ by {drift:+.3f} s in 0.2 s", "mend time keeping")
    answer = asked("timedatectl", "show", "--property=NTPSynchronized", "--value")
    if answer is None or answer.returncode:
        return ok("clocks", "steady; whether a time server is followed cannot be known here")
    if answer.stdout.strip() != "yes":
        return warning("clocks", "steady, not synchronized", "start chrony or systemd-timesyncd")
    return ok("clocks", "steady and synchronized")


def shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return warning("shared memory", "no /dev/shm", "mount one: NCCL and data need it")
    size = shutil.disk_usage(place)
    text = f"{size.free / 1e9:.1f} of {size.total / 1e9:.1f} GB free"
    if size.free < 512e6:
        return warning("shared memory", text, "give a container --ipc=host or --shm-size=2g")
    return ok("shared memory", text)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} open files ({hard} at most)"
    return ok("open files", text) if soft >= 1024 else warning("open files", text, "ulimit -n 65536")


def slurm() -> Finding:
    if shutil.which("sinfo") is None:
        return ok("slurm", "not here")
    answer = asked("sinfo", "--noheader", "--format=%P %a %D %t")
    if answer is None or answer.returncode:
        return warning("slurm", "sinfo is here and the controller does not answer", "scontrol ping; ask the operators")
    return ok("slurm", "; ".join(answer.stdout.split("\n")[:4]).strip("; "))


@contextmanager
def scratch(runs: Path) -> Iterator[Path]:
    """A folder of our own on the disk of the runs."""
    home = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".orthogon-doctor-", dir=home) as folder:
        yield Path(folder)


def disk(runs: Path) -> Finding:
    """Room, and the speed of a file that is written, synced and read back, and is what was written."""
    block = os.urandom(2**20)
    try:
        with scratch(runs) as folder:
            path = folder / "file"
            began = time.monotonic()
            with open(path, "wb") as file:
                for _ in range(MEGABYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            written = time.monotonic() - began
            began = time.monotonic()
            back = path.read_bytes()
            read = time.monotonic() - began
            same = back == block * MEGABYTES
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return failure("disk", f"{runs}: {error.strerror}", "choose another folder with --runs, or make room")
    speed = MEGABYTES / max(written, 1e-6)
    text = (
        f"{runs}: {free / 1e9:.1f} GB free, {speed:.0f} MB/s written and synced, {MEGABYTES / max(read, 1e-6):.0f} read"
    )
    if not same:
        return failure("disk", f"{runs}: what was read is not what was written", "do not use this disk")
    if free < 1e9:
        return failure("disk", text, "make room: a checkpoint of a small model takes that much")
    if speed < 50 or free < 10e9:
        return warning("disk", text, "checkpoints will be slow or few: see orthogon plan")
    return ok("disk", text)


_HOLD = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB)"


def locks(runs: Path) -> Finding:
    """A second process cannot have a lock that this one holds, and can once it is free: one writer per run folder."""
    mend = "mount it with locks (NFS: not nolock), or choose another folder with --runs"
    try:
        with scratch(runs) as folder:
            path = folder / "lock"
            path.touch()
            with open(path, "r+", encoding="utf-8") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                second = asked(sys.executable, "-S", "-c", _HOLD, str(path))
            later = asked(sys.executable, "-S", "-c", _HOLD, str(path))
    except OSError as error:
        return failure("locks", f"{runs}: {error.strerror}", mend)
    if second is None or later is None:
        return warning("locks", "a second process could not be started", "try again")
    if second.returncode == 0 or later.returncode:
        return failure("locks", f"file locks do not hold in {runs}", mend)
    return ok("locks", f"hold in {runs}")


def answered(line: list[str], environment: dict[str, str], answer: Path) -> Any:
    """The JSON that a process leaves in a folder, or its last words."""
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE:.0f} s"
    if not (answer / "answer.json").exists():
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads((answer / "answer.json").read_text(encoding="utf-8"))


def with_torch() -> Iterator[Finding]:
    """Torch, what it sees of the GPUs, and the compiler."""
    with tempfile.TemporaryDirectory(prefix="orthogon-") as folder:
        line = [sys.executable, "-m", "trainer", "probe", "device", f"--answer={folder}"]
        facts = answered(line, process.environment(), Path(folder))
    if isinstance(facts, str):
        yield failure("torch", facts, "pip install --constraint constraints.txt torch")
        return
    seen = facts["gpus"]
    sick = [index for index, gpu in enumerate(seen) if not gpu["sound"]]
    names = ", ".join(gpu["name"] for gpu in seen) or "no GPU"
    if sick:
        yield failure("torch", f"GPU {', '.join(map(str, sick))} multiplies wrongly", "leave it out")
    elif not seen and shutil.which("nvidia-smi") is not None:
        yield warning(
            "torch", f"torch {facts['torch']} sees none of the GPUs", "install torch for CUDA; see the driver"
        )
    else:
        yield ok("torch", f"{facts['torch']}, {names}")
    if facts["compiler"]:
        yield warning("compiler", facts["compiler"], "needed for train.compile only")
    else:
        yield ok("compiler", "train.compile has its compiler")


def all_reduce(ranks: int | None) -> Finding:
    """The local ranks sum a tensor under torchrun."""
    from trainer.config import GuardConfig, ResourcesConfig

    found = torchrun.ranks(SimpleNamespace(resources=ResourcesConfig()))  # type: ignore[arg-type]
    count = ranks or (found if found > 1 else 2)
    device = "auto" if shutil.which("nvidia-smi") else "cpu"
    config: Any = SimpleNamespace(resources=ResourcesConfig(ranks=count, device=device), guard=GuardConfig())  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="orthogon-") as folder:
        line = torchrun.command(config, "probe", f"all-reduce-{device}", f"--answer={folder}")
        fact = answered(line, torchrun.variables(config), Path(folder))
    if isinstance(fact, str):
        return failure("all-reduce", fact, "NCCL_DEBUG=INFO tells more; see the network and the driver")
    text = f"{fact['ranks']} ranks, {fact['backend']}: {fact['bytes_per_second'] / 1e9:.2f} GB/s per rank"
    if not fact["right"]:
        return failure("all-reduce", f"{text}, and the sum is WRONG", "leave this node out")
    return ok("all-reduce", f"{text}, right sum")


def record(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON values, and the worst of them."""
    results = {finding.result for finding in findings}
    worst = next((word for word in ("failure", "warning") if word in results), "ok")
    host = platform.node()
    return {"host": host, "result": worst, "checks": [asdict(f) for f in findings], "orthogon": _version()}


def _version() -> str | None:
    try:
        return metadata.version("orthogon")
    except metadata.PackageNotFoundError:
        return None
