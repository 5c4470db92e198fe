"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness, an extra) on an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint.export import export_of, loaded_model
from trainer.evaluate.text import beginning, load_tokenizer
from trainer.outcome import RunError


def harness(
    run: Path, step: int | None, export: Path | None, tasks: list[str], include: Path | None, limit: int | None
) -> dict[str, Any]:
    """The results of lm-eval's tasks on a checkpoint, which is exported if it is not yet, or on the export given.

    A text begins as a document does in training, with the BOS token.

    Args:
        tasks: names of lm-eval tasks or groups; most of them load their data from the hub.
        include: a folder with YAML files of further tasks.
        limit: first so many questions of each task.

    Raises:
        RunError: lm-eval is not installed, or it knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError(
            f"lm-eval is not installed: {error}", where="evaluate --lm-eval", mend="pip install 'orthogon[lm-eval]'"
        ) from None
    from tokenizers.processors import TemplateProcessing

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise RunError(
            f"lm-eval knows no task {', '.join(unknown)}",
            where="evaluate --lm-eval",
            mend="see `lm-eval ls tasks`, or give the folder of your own tasks with --lm-eval-folder",
        )
    folder = export or export_of(run, step)[0]
    tokenizer = load_tokenizer(run)
    marker = beginning(tokenizer)
    if marker:
        text = tokenizer.convert_ids_to_tokens(marker[0])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[text, "$A"], special_tokens=[(text, marker[0])]
        )
    whole, _, _ = loaded_model(run, None, folder)
    model = HFLM(pretrained=whole, tokenizer=tokenizer, add_bos_token=bool(marker) or None)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    results: dict[str, Any] = found["results"]
    return {
        "export": str(folder),
        "tasks": {name: _numbers(values) for name, values in results.items()},
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """A task's metrics, without the `,none` that lm-eval writes behind those that no filter has touched."""
    return {key.removesuffix(",none"): v for key, v in values.items() if isinstance(v, (int, float))}
