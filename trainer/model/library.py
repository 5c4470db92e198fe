"""What the `transformers` library knows of architectures, read from its source text: importing it costs seconds.

A login node tells a typo in `model.config` before a run folder is made. The ranks check again with the library itself
(`trainer.model.build`); where a file of it cannot be read this way, only they do.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from trainer.outcome import RunError
from trainer.yaml_source import nearest

# Keys of older configurations that the library itself turns into `rope_parameters`.
ROTARY = frozenset({"rope_theta", "rope_scaling"})


def check(config: dict[str, Any], where: str = "model.config") -> None:
    """Refuse what `transformers` would not understand, as far as its source tells.

    Raises:
        RunError: no such `model_type`, one without a causal language model, or a key that it has not.
    """
    kinds, causal = _table("auto_mappings.py", "CONFIG_MAPPING_NAMES"), _causal()
    if not kinds or not causal or "model_type" not in config:
        return
    kind = config["model_type"]
    if kind not in kinds and kind not in causal:
        raise unknown_type(kind, list(causal), where)
    if kind not in causal:
        raise no_head(kind, where)
    keys = known_keys(kind)
    for key in config if keys is not None else ():
        if key != "model_type" and key not in keys:
            raise unknown_key(kind, key, keys, where)


def unknown_type(kind: str, known: list[str], where: str) -> RunError:
    guess = nearest(str(kind), known)
    mend = f"did you mean {guess}?" if guess else "use a model_type of the transformers library, e.g. llama"
    return RunError(f"there is no model_type '{kind}'", where=f"{where}.model_type", mend=mend)


def no_head(kind: str, where: str) -> RunError:
    return RunError(
        f"{kind} has no causal language model head in transformers: it cannot be trained to predict the next token",
        where=f"{where}.model_type",
        mend="use a decoder such as llama, qwen3, gpt2, mistral or gemma2",
    )


def unknown_key(kind: str, key: str, known: set[str], where: str) -> RunError:
    guess = nearest(key, sorted(known))
    mend = f"did you mean {guess}?" if guess else f"see the documentation of {kind} in transformers"
    return RunError(f"{kind} has no key {key}", where=f"{where}.{key}", mend=mend)


@cache
def known_keys(kind: str) -> set[str] | None:
    """The keys of an architecture's configuration and their aliases; None where the source does not tell."""
    name = _table("auto_mappings.py", "CONFIG_MAPPING_NAMES").get(kind)
    folder = _table("auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(kind, kind).replace("-", "_")
    root = _root()
    if name is None or root is None:
        return None
    return _keys_of_class(root / "models" / folder / f"configuration_{folder}.py", name)


def _keys_of_class(path: Path, name: str) -> set[str] | None:
    """Annotated fields, aliases and constructor arguments of a configuration class and of those below it."""
    tree = _tree(path)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None) if tree else None
    if tree is None or found is None:
        return None
    keys: set[str] = set()
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" not in ast.unparse(node.annotation):
                keys.add(node.target.id)
        elif isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "attribute_map" for t in node.targets
        ):
            keys |= set(ast.literal_eval(node.value))
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            keys |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
    for base in found.bases:
        below = _base_keys(tree, path, ast.unparse(base))
        if below is None:
            return None
        keys |= below
    return keys | ROTARY if "rope_parameters" in keys else keys


def _base_keys(tree: ast.Module, path: Path, base: str) -> set[str] | None:
    if base.endswith("Mixin"):
        return set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and base in {alias.asname or alias.name for alias in node.names}:
            home = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            return _keys_of_class(home, base) if node.level else None
    return _keys_of_class(path, base)


def _causal() -> dict[str, str]:
    return _table("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@cache
def _table(file: str, name: str) -> dict[str, str]:
    """A literal `NAME = OrderedDict([(key, value), ...])` of the library's auto classes; empty if it is not there."""
    root = _root()
    path = root / "models" / "auto" / file if root else None
    if path is None or not path.is_file():
        return {}
    block = re.search(rf"^{name} = OrderedDict\(\n(.*?)^\)", path.read_text(encoding="utf-8"), re.M | re.S)
    return dict(re.findall(r'\(\s*"([^"]+)",\s*"([^"]+)"', block[1])) if block else {}


@cache
def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None


@cache
def _root() -> Path | None:
    found = importlib.util.find_spec("transformers")
    return Path(found.origin).parent if found and found.origin else None
