"""Whatever happens to a finished generation is seen, named, and the generation before is taken."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dist import bodies_saves as bodies

EXAMPLES = 520
OLD, NEW = "step-00000001", "step-00000002"
KINDS = (
    "truncate", "extend", "empty", "flip", "flip in the manifest", "delete", "add", "add nested", "add folder", "swap",
    "shard of the older", "manifest of the older", "the older as a whole", "manifest text", "link", "no file",
)  # fmt: skip


def regions(path: Path) -> list[tuple[int, int]]:
    """Length, header and data of a safetensors file; quarters of the manifest."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [(size * i // 4, size * (i + 1) // 4) for i in range(4)]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [(0, 8), (8, header), (header, size)]


def mutate(data: st.DataObject, kind: str, new: Path, old: Path) -> str:
    """Change the generation `new`; returns the name of the file that must be named."""
    shards = sorted(new.glob("*.safetensors"))
    manifest = new / "manifest.json"
    path = data.draw(st.sampled_from([*shards, manifest]))
    content = path.read_bytes()
    if kind == "truncate":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "extend":
        path.write_bytes(content + data.draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b" ", b"\n", bytes(4096)]))))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind.startswith("flip"):
        path = manifest if "manifest" in kind else path
        flipped = bytearray(path.read_bytes())
        start, stop = data.draw(st.sampled_from(regions(path)))
        flipped[data.draw(st.integers(start, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
    elif kind == "delete":
        path.unlink()
    elif kind.startswith("add"):
        name = data.draw(st.sampled_from([".metadata", "shard-00003-model.safetensors", "manifest.json.bak", "x", ".x.tmp"]))
        path = new / name if kind == "add" else new / "nested" / name
        path.parent.mkdir(exist_ok=True)
        if kind == "add folder":
            return "nested"
        path.write_bytes(data.draw(st.binary(max_size=5)))
        return "nested" if kind == "add nested" else name
    elif kind == "swap":
        a, b = data.draw(st.permutations([*shards, manifest]))[:2]
        a.rename(new / "t"), b.rename(a), (new / "t").rename(b)
        return "manifest.json" if manifest in (a, b) else ""
    elif kind == "shard of the older":
        path = data.draw(st.sampled_from(shards))
        shutil.copyfile(old / path.name, path)
    elif kind == "manifest of the older":
        shutil.copyfile(old / "manifest.json", manifest)
        return "manifest.json"
    elif kind == "the older as a whole":
        shutil.rmtree(new)
        shutil.copytree(old, new)
        return "manifest.json"
    elif kind == "manifest text":
        text = manifest.read_text()
        change = data.draw(st.sampled_from([
            ('"step": 2', '"step": 3'), ('"position": 2', '"position":  2'), ('"format": 1', '"format": 1.0'),
            ('"world_size": 2', '"world_size": 2,\n  "world_size": 2'), ("}", "} "), ("\n", "\r\n"),
            ('"manifest"', '"MANIFEST"'), ('"good": true', '"good": false'), (text, "[]"), (text, "null"), (text, "[" * 9999),
        ]))  # fmt: skip
        assert change[0] in text
        manifest.write_bytes(text.replace(*change, 1).encode())
        return "manifest.json"
    elif kind == "link":
        target = data.draw(st.sampled_from(["same", "nowhere", "itself", "older"]))
        aside = new.parent / "aside"
        path.rename(aside)
        path.symlink_to({"same": aside, "nowhere": "nowhere", "itself": path, "older": old / path.name}[target])
    else:
        path.unlink()
        data.draw(st.sampled_from([Path.mkdir, os.mkfifo]))(path)
    return path.name


def test_every_mutation_is_seen_named_and_the_older_one_taken(group, tmp_path) -> None:
    source, place = tmp_path / "source", tmp_path / "checkpoints"
    for step in (1, 2):
        group(2, bodies.save_good, str(source), step)
    assert group(1, bodies.choose, str(source)) == [NEW]
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in (OLD, NEW):
            shutil.copytree(source / name, place / name)
        kind = data.draw(st.sampled_from(KINDS))
        named = mutate(data, kind, place / NEW, place / OLD)
        assert group(1, bodies.choose, str(place)) == [OLD], kind
        assert not (place / NEW).exists()
        reason = (place / "quarantine" / NEW / "reason.txt").read_text()
        assert reason.startswith(named), (kind, reason)
        assert ": expected " in reason
        assert ", found " in reason
        seen[kind] += 1

    began = time.monotonic()
    one()
    print(f"{seen.total()} mutations in {time.monotonic() - began:.1f} s: {dict(seen)}")
    assert seen.total() >= 500
    assert seen.keys() == set(KINDS)
