"""The tools on one shared tiny run: samples, evaluation, averages, branches, generation."""

from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from launch.cli import dispatch
from tests.dist import bodies_run, bodies_strategies, bodies_tools
from tests.dist.strategies import NO_COMPILER
from tests.dist.test_cli import finished
from trainer import config as configuration
from trainer import lock
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.average import average_checkpoints, weights_of
from trainer.checkpoint.export import export_of, exported_model, loaded_model, restored_model
from trainer.config_data import sources_of
from trainer.data.prepare import _folder
from trainer.evaluate.choices import read_questions, row
from trainer.evaluate.sampling import Sampling
from trainer.evaluate.text import encode, generate, load_tokenizer
from trainer.files import sha256_file
from trainer.outcome import RunError
from trainer.model.build import model_tensors


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(tiny, prompts: list[str], sampling: Sampling, batch: int = 1) -> list[str]:
    model, room, device = loaded_model(tiny.folder, None, None)
    pieces = list(generate(model, load_tokenizer(tiny.folder), prompts, sampling, room=room, device=device, batch=batch))
    whole = [text for _, _, text in pieces if text is not None]
    streamed = ["".join(piece for index, piece, _ in pieces if index == i) for i in range(len(prompts))]
    assert streamed == [text.continuation for text in whole]
    return [text.continuation for text in whole]


# Text samples during training.


def test_a_run_is_bit_equal_with_and_without_samples_and_they_repeat(group, tiny) -> None:
    plain = group(2, bodies_run.train, tiny.yaml, ["--name=plain", "--evaluate.prompts=[]"])[0]
    assert plain["tensors"] == tiny.result["tensors"]
    assert plain["history"] == tiny.result["history"]
    assert not (tiny.place / "runs/plain/samples.jsonl").exists()
    samples = lines(tiny.folder / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(k, p) for k in (5, 10, 15, 20) for p in ("the sea", "of")]
    assert len({s["continuation"] for s in samples}) > 2
    overrides = ["--name=again"]
    assert group(2, bodies_run.train, tiny.yaml, overrides, 17)[0]["outcome"] == "preempted"
    again = tiny.place / "runs/again"
    for step in (15, 17):  # the resume goes back behind samples that were written
        manifests.remove(again / "checkpoints" / manifests.name(step))
    assert group(2, bodies_run.train, tiny.yaml, overrides)[0]["started"] == 10
    assert lines(again / "samples.jsonl") == samples


# Evaluation.


@pytest.fixture(scope="module")
def task(tiny) -> Path:
    path = tiny.place / "words.jsonl"
    words = ["the", "sea", "light", "over the", "stones", "birds"]
    questions = [
        {"query": f"the {a} of", "choices": [f" {b}" for b in words[i % 3 :]], "gold": i % 2, "id": i}
        for i, (a, b) in enumerate((a, b) for a in words for b in words[:2])
    ]
    questions.append({"query": "while " * 30, "choices": [" birds", " sing it"], "gold": 1})
    path.write_text("\n".join(json.dumps(q) for q in questions) + "\n\n")
    return path


@pytest.fixture(scope="module")
def evaluated(group, tiny, task) -> dict:
    return group(2, bodies_tools.evaluate, str(tiny.folder), [str(task)], [])[0]


def test_evaluation_is_the_same_on_1_2_3_ranks_and_equals_the_trainers(group, tiny, task, evaluated) -> None:
    for world in (1, 3):
        for answer in group(world, bodies_tools.evaluate, str(tiny.folder), [str(task)], []):
            assert answer == evaluated
    last = [r for r in tiny.result["history"] if "validation_loss" in r][-1]
    assert evaluated["validation"]["loss"] == last["validation_loss"]
    assert evaluated["validation"]["bits_per_byte"] == last["validation_bits_per_byte"]
    earlier = group(2, bodies_tools.evaluate, str(tiny.folder), [], [], 10)[0]
    assert earlier["validation"]["loss"] == next(
        r["validation_loss"] for r in tiny.result["history"] if r["step"] == 10 and "validation_loss" in r
    )
    assert earlier["sequences_trained_on"] == 80


def test_the_test_split_is_measured_where_there_is_one_and_is_no_validation(group, tiny, tmp_path) -> None:
    """Two equal runs that hold back the same two texts, with their parts exchanged."""
    text = (tiny.place / "corpus.txt").read_text().split("\n\n")
    for name, some in (("rest", text[12:]), ("a", text[:6]), ("b", text[6:12])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(some))
    found = {}
    for validation, test in ("ab", "ba"):
        paths = {"path": "rest", "validation_path": validation, "test_path": test}
        data = [f"--data.{key}={tmp_path}/{name}.txt" for key, name in paths.items()]
        run = group(1, bodies_run.train, tiny.yaml, [f"--name=held-{test}", "--train.length=1 steps", *data])[0]
        assert run["outcome"] == "finished"
        folder = str(tiny.place / f"runs/held-{test}")
        for split, name in (("validation", validation), ("test", test)):
            found[split, name] = group(1, bodies_tools.evaluate, folder, [], [], None, None, split)[0][split]
    for name in "ab":
        assert found["validation", name].pop("share_of_unigram") > 0
        assert found["validation", name] == found["test", name]
    assert found["test", "a"]["loss"] != found["test", "b"]["loss"]
    refused = group(1, bodies_tools.evaluate, str(tiny.folder), [], [], None, None, "test")[0]
    assert "the table of data has no test split" in refused["error"]


def test_a_batch_of_choices_is_the_same_rows_on_any_number_of_ranks(group) -> None:
    answers = [group(w, bodies_tools.likelihoods_of_a_model_that_sees_its_batch)[0] for w in (1, 2, 3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) == 11


def test_the_verb_evaluates_through_torchrun_and_errors_come_through_it(tiny, task, evaluated, tmp_path) -> None:
    code, text = finished("evaluate", "tiny", tiny.runs, "--json", "--tasks", str(task))
    assert code == 0, text
    assert json.loads(text) == evaluated
    (tmp_path / "bad.jsonl").write_text("{}")
    code, text = finished("evaluate", "tiny", tiny.runs, "--resources.ranks=1", "--tasks", str(tmp_path / "bad.jsonl"))
    assert (code, text.count("error:"), "'query' is missing" in text) == (78, 1, True)


def test_choices_are_scored_as_a_float64_model_scores_them_one_by_one(tiny, task, evaluated) -> None:
    checkpoint, manifest = manifests.pick(tiny.folder)
    model, tokenizer = restored_model(tiny.folder, checkpoint, manifest).double(), load_tokenizer(tiny.folder)
    raw = per_byte = cut = 0
    cost = []
    questions = read_questions(task)
    for question in questions:
        scores = []
        for choice in question.choices:
            ids = encode(tokenizer, question.query + choice)
            query = encode(tokenizer, question.query)  # words and spaces: no token reaches over the border
            assert ids[: len(query)] == query
            score, cut = 0.0, cut + (len(ids) > 17)
            with torch.no_grad():
                logs = model(torch.tensor([ids[-17:-1]])).logits[0].log_softmax(-1)
            for token, log in zip(ids[len(query) :], logs[-(len(ids) - len(query)) :], strict=True):
                score += float(log[token])
            scores.append(score)
        densities = [s / len(c) for s, c in zip(scores, question.choices, strict=True)]
        cost.append(-densities[question.gold] / math.log(2))
        raw += scores.index(max(scores)) == question.gold
        per_byte += densities.index(max(densities)) == question.gold
    found = evaluated["tasks"]["words"]
    assert (found["accuracy"], found["accuracy_per_byte"]) == (raw / len(questions), per_byte / len(questions))
    assert found["gold_bits_per_byte"] == pytest.approx(sum(cost) / len(cost), rel=1e-5)
    assert found["rows_cut"] == cut == 2
    share = raw / len(questions)
    assert found["accuracy_error"] == pytest.approx(math.sqrt(share * (1 - share) / len(questions)))


def test_a_token_over_the_border_belongs_to_the_choice_and_a_long_choice_is_refused(tiny) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    word = tokenizer.decode([max(range(len(tokenizer)), key=lambda i: len(tokenizer.decode([i])) * (i > 1))])
    assert word.startswith(" ")
    assert len(word) > 3
    plain = row(tokenizer, "the" + word, " of", 16)
    assert tokenizer.decode(plain.ids[plain.start :]) == " of"
    inside = row(tokenizer, "the" + word[:2], word[2:] + " of", 16)  # cut inside a token
    assert inside.ids == plain.ids
    assert tokenizer.decode(inside.ids[inside.start :]) == word + " of"
    with pytest.raises(RunError, match="the model takes 16"):
        row(tokenizer, "the", " zq" * 20, 16)


def test_bad_tasks_name_file_and_line(group, tiny, tmp_path) -> None:
    for text, words in (
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "choices": ["b"], "gold": 0}', "two or more"),
        ('\n{"query": "a", "choices": ["b", "c"], "gold": 2}', "no index from 0 to 1"),
        ('\n{"choices": ["b", "c"], "gold": 1}', "'query' is missing"),
        ("\n{", "no valid JSON"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_text(text)
        for answer in group(2, bodies_tools.evaluate, str(tiny.folder), [str(path)], []):
            assert words in answer["error"]
            assert "bad.jsonl:2" in answer["error"]


@pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
def test_tools_on_a_compiled_run_with_loss_in_chunks_answer_as_without(group, tiny, task) -> None:
    """No tool compiles, and logits in chunks are the same logits: nothing depends on what the run was trained with."""
    overrides = ["--name=fast", "--train.length=5 steps", "--train.loss_chunk=5"]
    result = group(2, bodies_strategies.compiled, tiny.yaml, overrides, "aot_eager")[0]
    assert result["graphs"] >= 1
    folder = tiny.place / "runs/fast"
    plain = ["--train.loss_chunk=null", "--train.compile=false"]
    fast, slow = (
        group(2, bodies_tools.evaluate_without_a_compiler, str(folder), [str(task)], more)[0] for more in ([], plain)
    )
    assert fast["tasks"] == slow["tasks"]
    assert fast["validation"]["loss"] == pytest.approx(slow["validation"]["loss"], rel=1e-6)
    assert fast["validation"]["loss"] == pytest.approx(
        next(r["validation_loss"] for r in result["history"] if "validation_loss" in r), rel=1e-5
    )
    samples = [s["continuation"] for s in lines(folder / "samples.jsonl")]
    checkpoint, manifest = manifests.pick(folder)
    model, room, device = loaded_model(folder, None, None)
    drawn = Sampling(tokens=6, seed=0)
    prompts = ["the sea", "of"]
    found = [t for _, _, t in generate(model, load_tokenizer(folder), prompts, drawn, room=room, device=device, batch=2)]
    assert [t.continuation for t in found if t is not None] == samples
    target, _ = export_of(folder)  # which compares logits with the trainer's
    exported = model_tensors(exported_model(target))
    for name, tensor in model_tensors(restored_model(folder, checkpoint, manifest)).items():
        assert torch.equal(tensor, exported[name]), name


# Averages.


def test_an_average_is_the_float64_mean_of_verified_checkpoints_and_evaluates(group, tiny, tmp_path) -> None:
    said: list[str] = []
    target = average_checkpoints(tiny.folder, [10, 20, 15], 0.25, tmp_path / "ema", said.append)
    assert weights_of(3, 0.25) == pytest.approx([0.0625, 0.1875, 0.75])
    average = model_tensors(exported_model(target))
    wholes = []
    for step in (10, 15, 20):
        checkpoint, manifest = manifests.pick(tiny.folder, step)
        wholes.append(model_tensors(restored_model(tiny.folder, checkpoint, manifest)))
    for name, tensor in average.items():
        parts = [share * whole[name].double() for share, whole in zip(weights_of(3, 0.25), wholes, strict=True)]
        torch.testing.assert_close(tensor, sum(parts).float(), rtol=0, atol=1e-7)
        if tensor.ndim == 2:
            assert not torch.equal(tensor, wholes[-1][name])
    assert [c["name"] for c in json.loads((target / "average.json").read_text())["checkpoints"]] == [
        "step-00000010", "step-00000015", "step-00000020",
    ]  # fmt: skip
    assert said[-1].endswith("largest difference of logits: 0")
    answers = [group(w, bodies_tools.evaluate, str(tiny.folder), [], [], None, str(target))[0] for w in (1, 2)]
    assert answers[0] == answers[1]
    assert answers[0]["validation"]["loss"] < tiny.result["history"][0]["loss"]


def test_an_average_refuses_what_it_must(tiny, tmp_path, monkeypatch) -> None:
    with pytest.raises(RunError, match="exists"):
        average_checkpoints(tiny.folder, [], None, tmp_path, print)
    with pytest.raises(RunError, match="two checkpoints or more"):
        average_checkpoints(tiny.folder, [10, 10], None, None, print)
    with pytest.raises(RunError, match="no checkpoint of step 11"):
        average_checkpoints(tiny.folder, [10, 11], None, None, print)

    def damaged(folder: Path) -> None:
        raise manifests.Damaged("shard", "this", "that")

    monkeypatch.setattr(manifests, "verify", damaged)
    with pytest.raises(RunError, match="step-00000010 is damaged: shard: expected this, found that"):
        average_checkpoints(tiny.folder, [10, 15], None, None, print)
    assert not (tiny.folder / "export").exists() or not list((tiny.folder / "export").glob("average*"))


# Branches.


def test_a_branch_goes_on_bit_equal_to_its_source_and_leaves_it_alone(group, tiny, capsys) -> None:
    before = {p: (sha256_file(p), p.stat().st_mtime_ns) for p in sorted(tiny.folder.rglob("*")) if p.is_file()}
    assert dispatch(["branch", "tiny", "--from-step", "10", "--name", "twin", tiny.runs]) == 0
    said = capsys.readouterr().out
    assert "orthogon resume twin --runs=" in said
    twin = tiny.place / "runs/twin"
    record = json.loads((twin / "run.json").read_text())["lineage"]
    assert (record["run"], record["checkpoint"], record["position"]) == ("tiny", "step-00000010", 80)
    assert manifests.verify(twin / "checkpoints/step-00000010").step == 10
    result = group(2, bodies_run.train, tiny.yaml, ["--name=twin"])[0]
    assert (result["started"], result["step"]) == (10, 20)
    assert result["tensors"] == tiny.result["tensors"]
    assert result["history"] == [r for r in tiny.result["history"] if r["step"] > 10]
    assert before == {p: (sha256_file(p), p.stat().st_mtime_ns) for p in sorted(tiny.folder.rglob("*")) if p.is_file()}


def test_a_cooldown_branches_from_the_stable_phase(group, tiny, capsys) -> None:
    assert dispatch(["branch", "tiny", "--from-step=10", "--name=cool", "--cooldown=4 steps", tiny.runs]) == 0
    said = capsys.readouterr().out
    assert f"changed: schedule.decay from 0.3 to {4 / 14}" in said
    assert "changed: train.length from '20 steps' to '14 steps'" in said
    assert "learning rate at step 11: 1.0000 of the full rate in tiny" in said
    assert "learning rate at step 11: 0.8000 of the full rate in cool" in said
    result = group(2, bodies_run.train, tiny.yaml, ["--name=cool", "--train.length=14 steps", f"--schedule.decay={4 / 14}"])[0]
    rates = [r["learning_rate_factor"] for r in result["history"] if "loss" in r]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_run_that_waits_for_the_data_of_another_answers_signals(group, tiny) -> None:
    overrides = [f"--data.folder={tiny.place}/elsewhere"]
    config = configuration.load(Path(tiny.yaml), overrides)
    (source,) = sources_of(config.data).items()
    with lock.turn(lock.beside(_folder(*source, config.data)), "it", print):
        (found,) = group(1, bodies_tools.open_until_asked, tiny.yaml, overrides, str(tiny.place))
    assert found["outcome"] == "preempted"
    assert "SIGTERM came while data was prepared" in found["error"]


def test_an_export_that_another_process_makes_is_waited_for(tiny) -> None:
    run = tiny.folder
    target = run / "export/step-00000010"
    assert manifests.pick(run, 10)[0].name == target.name
    assert not target.exists()
    with ThreadPoolExecutor(1) as pool:
        with lock.turn(run / "export/lock", "it", print):
            found = pool.submit(export_of, run, 10)
            time.sleep(2.0)
            assert not found.done()
            target.mkdir()
            (target / "config.json").write_text("{}")
        assert found.result() == (target, False)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    shutil.rmtree(target)
    assert export_of(run, 10) == (target, True)
    shutil.rmtree(target)


def test_a_branch_that_cannot_be_leaves_nothing(tiny, monkeypatch) -> None:
    for arguments, words in (
        (["--from-step=11", "--name=no"], "no checkpoint of step 11"),
        (["--name=no"], "leaves nothing to train"),
        (["--from-step=10", "--name=tiny"], "there is a run tiny already"),
        (["--from-step=10", "--name=no", "--data.sequence_length=8"], "data.sequence_length was 16"),
        (["--from-step=10", "--name=no", "--cooldown=4"], "is no length"),
        (["--from-step=10", "--name=no", "--cooldown=4 steps", "--train.length=20 steps"], "--cooldown sets train.length"),
        (["--from-step=10", "--name=no", "--optim.name=adamw"], "unknown key optim"),
    ):
        with pytest.raises(RunError, match=words):
            dispatch(["branch", "tiny", tiny.runs, *arguments])
        assert not (tiny.place / "runs/no").exists()

    def no_link(source: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(manifests.os, "link", no_link)
    assert dispatch(["branch", "tiny", "--from-step=10", "--name=copied", tiny.runs]) == 0
    copy = next((tiny.place / "runs/copied/checkpoints/step-00000010").glob("*.safetensors"))
    assert copy.stat().st_nlink == 1
    monkeypatch.setattr(manifests, "fsync_file", lambda path: path.write_bytes(b"rotten"))
    with pytest.raises(RunError, match="could not be copied"):
        dispatch(["branch", "tiny", "--from-step=10", "--name=no", tiny.runs])
    assert not (tiny.place / "runs/no").exists()


# Generation.


def test_greedy_text_equals_the_librarys_and_batches_equal_single_prompts(tiny) -> None:
    prompts = ["the sea", "of light runs over", "seven"]
    greedy = Sampling(tokens=8, temperature=0)
    single = texts(tiny, prompts, greedy)
    tokenizer, model = load_tokenizer(tiny.folder), exported_model(export_of(tiny.folder)[0])
    for prompt, mine in zip(prompts, single, strict=True):
        ids = torch.tensor([encode(tokenizer, prompt)])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(8, 16 - ids.shape[1]),
                               do_sample=False, pad_token_id=0)  # fmt: skip
        assert prompt + mine == tokenizer.decode(whole[0], skip_special_tokens=True)
    assert texts(tiny, prompts, greedy, batch=3) == single
    drawn = Sampling(tokens=8, seed=5)
    assert texts(tiny, prompts, drawn, batch=2) == texts(tiny, prompts, drawn)
    assert texts(tiny, prompts, drawn) != texts(tiny, prompts, Sampling(tokens=8, seed=6))


def test_a_prompt_at_the_models_end_is_cut_and_the_text_says_why_it_stops(tiny) -> None:
    model, room, device = loaded_model(tiny.folder, None, None)
    tokenizer = load_tokenizer(tiny.folder)
    some = ["while birds sing " * 9, "the"]
    found = [t for _, _, t in generate(model, tokenizer, some, Sampling(tokens=99, temperature=0), room=room, device=device)]
    long, short = (text for text in found if text is not None)
    assert (long.ended, long.tokens, long.cut) == ("context", 8, len(encode(tokenizer, some[0])) - 8)
    assert (short.ended, short.cut) == ("context", 0)
    assert len(encode(tokenizer, "the")) + short.tokens == room
