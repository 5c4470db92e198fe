"""Whether a Slurm cluster can be emulated here; Debian's packages are installed where that is allowed and they are absent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server-core",
    "mariadb-client-core", "iproute2",
)  # fmt: skip
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db", "ip")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEVER_START = Path("/usr/sbin/policy-rc.d")
"""What Debian's packages ask before they start a daemon."""


def reason_not_to() -> str | None:
    """Why no cluster can be emulated here; None if one can, with everything installed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an emulated cluster needs root on Linux"
    reason = _no_namespaces()
    if reason is None and missing():
        reason = _install()
    return reason


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if program(name) is None]


def program(name: str) -> str | None:
    """The path of an installed program."""
    return shutil.which(name, path=PATH)


def _no_namespaces() -> str | None:
    words = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "true"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"namespaces cannot be made: {error}"
    return f"namespaces are not allowed: {answer.stderr.strip()}" if answer.returncode else None


def _install() -> str | None:
    """Install the packages with apt-get; returns why that failed."""
    if shutil.which("apt-get") is None:
        return f"not installed, and there is no apt-get: {', '.join(missing())}"
    made = not NEVER_START.exists()
    if made:  # the emulated cluster starts its own daemons
        NEVER_START.write_text("#!/bin/sh\nexit 101\n")
        NEVER_START.chmod(0o755)
    try:
        lock = ["-o", "DPkg::Lock::Timeout=300"]
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            answer = subprocess.run(
                ["apt-get", *lock, *words], env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True,
                text=True, timeout=600, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "apt-get did not end within ten minutes"
    finally:
        if made:
            NEVER_START.unlink(missing_ok=True)
    if missing():
        last = (answer.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"apt-get installed no {', '.join(missing())}: {last}"
    return None
