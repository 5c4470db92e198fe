"""`make audit`, part of `make lint`: the installed packages fit together, are the pinned ones, and have no known advisory.

Advisories come from the package index through pip-audit. An index without them (many mirrors have none) is told as what it
is: nothing was checked against advisories. It does not fail the audit, since it says nothing about the packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
OWN = {"orthogon", "pip", "setuptools", "wheel"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """The pinned version of each package."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def loose() -> list[str]:
    """Installed packages that are not pinned, or have another version than the pinned one."""
    pinned = pins()
    found = {normal(d.metadata["Name"]): d.version for d in metadata.distributions()}
    return [
        f"{name} {version} (pinned: {pinned.get(name, 'not at all')})"
        for name, version in sorted(found.items())
        if name not in OWN and version.partition("+")[0] != pinned.get(name)
    ]


def advisories() -> tuple[list[str], int, int]:
    """Known advisories, and how many of the pinned packages could be looked up, of how many."""
    line = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--format=json"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    try:
        packages = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        return [], 0, len(pins())
    looked_up = [package for package in packages if "vulns" in package]
    found = [
        f"{package['name']} {package['version']}: {vuln['id']}, mended in {', '.join(vuln['fix_versions']) or 'no version'}"
        for package in looked_up
        for vuln in package["vulns"]
    ]
    return found, len(looked_up), len(packages)


def main() -> int:
    """Print what is wrong; the exit code says whether anything is."""
    together = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    wrong = together.stdout.splitlines() if together.returncode else []
    wrong += [f"not pinned in constraints.txt: {one}" for one in loose()]
    found, looked_up, total = advisories()
    for problem in [*wrong, *found]:
        print(problem)
    if looked_up < total:
        print(
            f"advisories: the package index has none for {total - looked_up} of {total} packages: those were NOT checked"
        )
    print(
        f"audit: {len(pins())} pins, {len(wrong)} that do not fit, {len(found)} known advisories in {looked_up} packages"
    )
    return 1 if wrong or found else 0


if __name__ == "__main__":
    sys.exit(main())
