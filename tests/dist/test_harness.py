"""lm-eval, an extra: refused with the mend where it is absent; where it is installed, it agrees with our own scores."""

from __future__ import annotations

import importlib.util
import json

import pytest

from launch.cli import dispatch
from tests.dist import bodies_tools
from trainer.evaluate.harness import harness
from trainer.outcome import RunError

HERE = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_bytes}}]
"""


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_lm_eval_it_is_refused_with_the_mend(tiny) -> None:
    for work in (
        lambda: dispatch(["evaluate", "tiny", tiny.runs, "--lm-eval", "hellaswag"]),
        lambda: harness(tiny.folder, None, None, ["hellaswag"], None, None),
    ):
        with pytest.raises(RunError) as found:
            work()
        assert found.value.mend == "pip install 'orthogon[lm-eval]'"


@pytest.mark.skipif(not HERE, reason="lm-eval is an extra: pip install 'orthogon[lm-eval]'")
def test_lm_eval_agrees_with_our_scores(group, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["the", "sea", "light runs", "of stones", "birds"]
    questions = [
        {"query": f"the {a}", "choices": [f" {b}" for b in words[i % 3 :]], "gold": i % 2}
        for i, (a, b) in enumerate((a, b) for a in words for b in words)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "words.yaml").write_text(TASK.format(path=path))
    ours = group(1, bodies_tools.evaluate, str(tiny.folder), [str(path)], [])[0]["tasks"]["words"]
    theirs = harness(tiny.folder, None, None, ["words"], tmp_path, None)["tasks"]["words"]
    assert theirs["acc"] == ours["accuracy"]
    assert theirs["acc_bytes"] == ours["accuracy_per_byte"]
    assert theirs["acc_stderr"] == pytest.approx(ours["accuracy_error"], rel=0.05)  # n - 1 in theirs
    with pytest.raises(RunError, match="lm-eval knows no task nothing"):
        harness(tiny.folder, None, None, ["nothing"], None, None)
