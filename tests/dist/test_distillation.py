"""Students of tiny teachers: live and from caches, on any number of ranks, killed and resumed, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dist import bodies_distill, bodies_run
from tests.dist.group import RankFailed
from tests.dist.strategies import ABSENT
from tests.dist.test_cli import finished
from trainer import lock
from trainer.checkpoint import manifest as manifests
from trainer.ensemble import manifest

SHORT = ["--train.length=4 steps", "--evaluate.prompts=[]", "--evaluate.every=50 steps", "--checkpoint.every=2 steps"]
PAIR = ["--distill.teacher=pair"]


@pytest.fixture(scope="module")
def runs(group, tiny) -> Path:
    """The tiny run, another one under other seeds, and their ensemble `pair`."""
    seeds = ["--name=tiny-9", "--seed=9", "--data.order_seed=9", "--evaluate.prompts=[]"]
    assert group(2, bodies_run.train, tiny.yaml, seeds)[0]["outcome"] == "finished"
    runs = tiny.place / "runs"
    manifest.write(runs, manifest.make("pair", runs, ["tiny", "tiny-9"], "logit mean"))
    return runs


def student(group, tiny, name: str, world: int, *overrides: str) -> dict:
    return group(world, bodies_distill.train, tiny.yaml, [f"--name={name}", *SHORT, *overrides])[0]


def cached(group, tiny, out: str, world: int, form: dict, *faults_and_offload: str) -> dict:
    return group(world, bodies_distill.cache, tiny.yaml, [], "pair", form, str(tiny.place / out), *faults_and_offload)[0]


HIDDEN = {"name": "hidden", "dtype": "fp32"}


@pytest.fixture(scope="module")
def live(group, tiny, runs) -> dict:
    return student(group, tiny, "live", 2, *PAIR)


@pytest.fixture(scope="module")
def hidden(group, tiny, runs) -> str:
    assert cached(group, tiny, "hidden", 2, HIDDEN)["bytes_per_token"] > 4 * 2 * 24
    return str(tiny.place / "hidden")


def figures(result: dict) -> list[list[float]]:
    assert "error" not in result, result["error"]
    return [[r["loss"], r["cross_entropy"], r["distill_kl"], r["gradient_norm"]] for r in result["history"] if "loss" in r]


def close(one: dict, other: dict, bound: float = 1e-5) -> None:
    for a, b in zip(figures(one), figures(other), strict=True):
        assert a == pytest.approx(b, rel=bound)


def files(folder: Path) -> dict[str, str]:
    """Digests of what a cache consists of."""
    kept = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_a_student_learns_alike_on_1_2_3_ranks_and_under_every_strategy(group, tiny, live) -> None:
    assert (live["outcome"], live["asked"]) == ("finished", 4 * 2)
    for loss, entropy, kl, _ in figures(live):
        assert loss == pytest.approx(0.1 * entropy + 0.9 * kl, rel=1e-6)
    assert figures(live)[-1][2] < figures(live)[0][2]
    assert all("distill_kl" not in r for r in live["history"] if "validation_loss" in r)
    for world, parallel, chunk in ((3, "fsdp2", "null"), (2, "ddp", "3"), (1, "single", "null")):
        extra = (f"--parallel={{name: {parallel}}}", f"--train.loss_chunk={chunk}")
        close(student(group, tiny, f"live-{world}-{parallel}", world, *PAIR, *extra), live)


@pytest.mark.skipif(ABSENT, reason="deepspeed is not installed")
def test_a_student_under_zero_learns_as_under_fsdp2(group, tiny, runs) -> None:
    adamw = "--optim={name: adamw, lr: 0.01}"
    one = student(group, tiny, "adamw-fsdp2", 2, *PAIR, adamw)
    close(student(group, tiny, "adamw-zero", 2, *PAIR, adamw, "--parallel={name: deepspeed, stage: 2}"), one, 1e-4)


def test_the_teacher_is_in_no_checkpoint_and_its_shards_are_freed(group, tiny, runs, live) -> None:
    _, one = manifests.pick(runs / "live")
    _, plain = manifests.pick(runs / "tiny")
    assert one.tensors.keys() == plain.tensors.keys()
    assert [member["run"] for member in one.state["teacher"]["ensemble"]["members"]] == ["tiny", "tiny-9"]
    for answer in group(2, bodies_distill.members_between_steps, tiny.yaml, [], "pair"):
        assert answer == {"sharded": True, "frozen": True, "eval": True}


def test_alpha_0_is_the_plain_run_to_the_bit(group, tiny, runs) -> None:
    plain = student(group, tiny, "undistilled", 2)
    none = student(group, tiny, "none", 2, *PAIR, "--distill.alpha=0")
    assert (none["tensors"], none["history"], none["asked"]) == (plain["tensors"], plain["history"], 0)
    some = student(group, tiny, "some", 2, *PAIR, "--distill.alpha=0.01")  # negative control
    assert some["tensors"] != plain["tensors"]


def test_a_run_teaches_itself_anew_and_the_mean_of_probabilities_teaches_too(group, tiny, runs, live) -> None:
    own = student(group, tiny, "own", 2, "--distill.teacher=tiny", "--distill.temperature=2")
    assert own["outcome"] == "finished"
    made = manifest.read(runs, "pair")
    manifest.write(runs, manifest.Ensemble(**{**vars(made), "name": "probable", "rule": "probability mean"}))
    other = student(group, tiny, "probable-student", 2, "--distill.teacher=probable")
    assert figures(other)[0][1] == pytest.approx(figures(live)[0][1], rel=1e-6)
    assert abs(figures(other)[0][2] - figures(live)[0][2]) > 1e-6


def test_a_cache_has_the_same_bytes_from_any_number_of_ranks_and_goes_on_after_a_kill(group, tiny, hidden) -> None:
    for form in (HIDDEN, {"name": "top-k", "k": 8}, {"name": "sampled", "draws": 20}):
        name = form["name"]
        found = [cached(group, tiny, f"{name}-{world}", world, form) for world in (1, 3)]
        assert found[0]["parts"] > 20
        assert found[0]["before"] == 0
        contents = [files(tiny.place / f"{name}-{world}") for world in (1, 3)]
        assert contents[0] == contents[1]
    assert contents[0] != files(Path(hidden)) == files(tiny.place / "hidden-1")
    left = tiny.place / "offloaded/offloaded/0/0/index.json"  # of another teacher, whose start was refused
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    cached(group, tiny, "offloaded", 1, HIDDEN, "", "disk")
    cached(group, tiny, "offloaded", 1, HIDDEN, "", "disk")  # finished before
    assert not (tiny.place / "offloaded/offloaded").exists()
    assert files(tiny.place / "offloaded") == files(Path(hidden))
    with pytest.raises(RankFailed, match="died"):
        cached(group, tiny, "killed", 2, HIDDEN, "kill@cache.part rank=1 step=5")
    assert not (tiny.place / "killed/cache.json").exists()
    answer = student(group, tiny, "early", 1, *PAIR, f"--distill.cache={tiny.place}/killed")
    assert "is not finished" in answer["error"]
    assert "holds a cache of something else" in cached(group, tiny, "killed", 2, {"name": "top-k", "k": 3})["error"]
    rest = cached(group, tiny, "killed", 2, HIDDEN)
    assert 8 <= rest["before"] < rest["parts"]
    assert files(tiny.place / "killed") == files(Path(hidden))


def test_a_cache_that_another_process_makes_is_waited_for(group, tiny, hidden) -> None:
    folder = tiny.place / "waited"
    with ThreadPoolExecutor(1) as pool:
        with lock.turn(folder / "lock", "it", print):
            found = pool.submit(cached, group, tiny, "waited", 2, HIDDEN)
            time.sleep(2.0)
            assert not found.done()
            assert [path.name for path in folder.iterdir()] == ["lock"]
        assert found.result()["before"] == 0
    assert files(folder) == files(Path(hidden))


def test_a_student_of_hidden_states_is_that_of_live_members(group, tiny, live, hidden) -> None:
    result = student(group, tiny, "from-hidden-1", 1, *PAIR, f"--distill.cache={hidden}", "--train.micro_batch_size=5")
    assert result["asked"] == 0
    close(result, live)
    for form, bound in (({"name": "top-k", "k": 301}, 1e-3), ({"name": "hidden", "dtype": "bf16"}, 2e-2)):
        cached(group, tiny, f"all-{form['name']}", 1, form)
        result = student(group, tiny, f"from-all-{form['name']}", 1, *PAIR, f"--distill.cache={tiny.place}/all-{form['name']}")
        close(result, live, bound)


def test_a_killed_student_goes_on_bit_for_bit(group, tiny, runs, hidden) -> None:
    cached(group, tiny, "draws", 1, {"name": "sampled", "draws": 50})
    for name, cache in (("h", hidden), ("d", f"{tiny.place}/draws")):
        given = [*SHORT, *PAIR, f"--distill.cache={cache}"]
        calm = group(2, bodies_distill.train, tiny.yaml, [f"--name=calm-{name}", *given])[0]
        with pytest.raises(RankFailed, match="died"):
            group(2, bodies_distill.train, tiny.yaml, [f"--name=hit-{name}", *given], "kill@step.updated rank=1 step=4")
        back = group(2, bodies_distill.train, tiny.yaml, [f"--name=hit-{name}", *given])[0]
        assert back["started"] == 2
        assert (back["tensors"], back["history"]) == (calm["tensors"], calm["history"])


def test_other_data_teachers_and_targets_are_refused_with_one_sentence(group, tiny, runs, hidden) -> None:
    given = [*PAIR, f"--distill.cache={hidden}"]
    text = (tiny.place / "corpus.txt").read_text()
    (tiny.place / "longer.txt").write_text(text.replace("the", "thee", 1))
    tokenizer = f"--data.tokenizer={{path: {runs}/tiny/tokenizer}}"
    for extra, words in (
        ([tokenizer, f"--data.path={tiny.place}/longer.txt"], "the cache was made for other training tokens of data"),
        ([tokenizer, "--data.sequence_length=32"], "another sequence length (16) than the run's (32)"),
        (["--data.subset_tokens=160"], "the cache was made for another subset of data"),
        (["--data.document_masking=true"], "another document masking (False) than the run's (True)"),
        (["--data.tokenizer={vocab_size: 290}"], "teacher pair has another tokenizer"),
        (["--distill.teacher=tiny"], "the cache holds the answers of another teacher"),
        (["--distill.teacher=nobody"], "there is no ensemble and no run nobody"),
        ([f"--distill.cache={tiny.place}/nothing"], "there is no cache in"),
    ):
        answers = group(2, bodies_distill.train, tiny.yaml, ["--name=refused", *SHORT, *given, *extra])
        assert all(words in answer["error"] for answer in answers), answers[0]
        shutil.rmtree(runs / "refused")
    cached(group, tiny, "few", 1, {"name": "top-k", "k": 4})
    answer = student(group, tiny, "hot", 1, *PAIR, f"--distill.cache={tiny.place}/few", "--distill.temperature=2")
    assert "holds the distributions of temperature 1" in answer["error"]
    part = tiny.place / "few/part-00003.bin"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    answer = student(group, tiny, "harmed", 2, *PAIR, f"--distill.cache={tiny.place}/few")
    assert "the cache is damaged: part-00003.bin" in answer["error"]
    part.write_bytes(content)
    other = group(2, bodies_distill.train, tiny.yaml, ["--name=calm-h", *SHORT, *PAIR, f"--distill.cache={tiny.place}/few"])[0]
    assert "the run began with other targets than it would go on with: those of another cache" in other["error"]


def test_one_command_makes_a_cache_and_a_student_and_goes_on(tiny, runs) -> None:
    command = (
        "distill", "logits", tiny.yaml, "--teacher=pair", "--form=sampled", "--draws=9", "--alpha=0.5", "--name=pupil", tiny.runs,
        "--train.length=2 steps", "--resources.ranks=1", "--evaluate.prompts=[]", "--finish.export=false",
    )  # fmt: skip
    code, text = finished(*command)
    assert code == 0, text
    assert "pupil: finished (2 of 2)" in text
    record = json.loads((runs / "pupil/metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(0.5 * record["cross_entropy"] + 0.5 * record["distill_kl"])
    assert (runs / "caches/pair-sampled9/cache.json").exists()
