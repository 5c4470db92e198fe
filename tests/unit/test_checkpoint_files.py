"""A generation is believed only if every bit is as listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.checkpoint.retention import prune
from trainer.files import sha256_file


def generation(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / manifests.name(step)
    folder.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(bytes(range(256)) * 8 + f"{name}{step}".encode())
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(folder.iterdir())}
    manifest = Manifest(step=step, position=step, world_size=2, files=files, tensors={}, config={"lr": 0.1}, state={})
    manifests.write(folder, manifest)
    return folder


def test_a_good_generation_verifies_and_reads_back(tmp_path) -> None:
    folder = generation(tmp_path, 3)
    assert manifests.verify(folder) == manifests.read(folder)
    assert manifests.verify(folder).step == 3


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_mutation_is_detected(tmp_path_factory, data) -> None:
    folder = generation(tmp_path_factory.mktemp("g"), 1)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "truncate", "append", "remove", "extra", "swap"]))
    if kind == "flip":
        offset = data.draw(st.integers(0, len(content) - 1))
        bit = data.draw(st.integers(0, 7))
        content[offset] ^= 1 << bit
        path.write_bytes(content)
    elif kind == "truncate":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    elif kind == "append":
        path.write_bytes(content + b"x")
    elif kind == "remove":
        path.unlink()
    elif kind == "extra":
        (folder / data.draw(st.sampled_from([".metadata", "c.safetensors"]))).write_bytes(b"")
    else:
        a, b = folder / "a.safetensors", folder / "b.safetensors"
        a.rename(folder / "t"), b.rename(a), (folder / "t").rename(b)
    with pytest.raises(Damaged) as damage:
        manifests.verify(folder)
    assert damage.value.file
    assert damage.value.expected != damage.value.found


def test_temporary_and_quarantined_folders_do_not_count(tmp_path) -> None:
    generation(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-1").mkdir()
    bad = generation(tmp_path, 3)
    place = manifests.quarantine(bad, "why")
    generation(tmp_path, 3)
    again = manifests.quarantine(tmp_path / "step-00000003", "again")
    assert [p.name for p in manifests.generations(tmp_path)] == ["step-00000001"]
    assert (place.name, again.name) == ("step-00000003", "step-00000003-2")
    assert (place / "reason.txt").read_text() == "why\n"


def test_retention_counts_good_generations_only(tmp_path) -> None:
    for step in range(1, 6):
        generation(tmp_path, step)
    for step in (4, 5):
        (tmp_path / manifests.name(step) / "a.safetensors").unlink()
    (tmp_path / "step-00000006.tmp-2").mkdir()
    removed, problem = prune(tmp_path, 1)
    assert [p.name for p in manifests.generations(tmp_path)] == [manifests.name(s) for s in (5, 4, 3)]
    assert set(removed) == {manifests.name(1), manifests.name(2), "step-00000006.tmp-2"}
    assert problem == ""
