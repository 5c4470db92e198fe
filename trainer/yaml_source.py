"""A YAML file that remembers the line of every key, merged with its base and with overrides from the command line."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.outcome import RunError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 of PyYAML reads 1e-3 as a string, yes/no/on/off as booleans, 24:00:00 as 86400; YAML 1.2 and people do not."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, expression)
        for tag, expression in pairs
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


@dataclass
class Source:
    """Raw configuration values and where each of them came from."""

    raw: dict[str, Any]
    file: str
    origins: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, is_base: bool = False) -> Source:
        """Read a file, and the file that its `base:` names (relative to it; at most one, without a base of its own)."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RunError(f"there is no file {path}", mend="check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path} cannot be read: {error}", mend="check the file") from None
        try:
            node = yaml.compose(text, Loader=_Loader)
            source = cls(raw={}, file=str(path))
            if not isinstance(node, yaml.MappingNode):
                raise RunError("the file holds no keys", where=str(path), mend="start from configs/quickstart.yaml")
            source.raw = source._mapping(node, "")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RunError(f"no valid YAML: {error.problem}", where=f"{path}:{line}", mend="correct the line") from None
        base = source.raw.pop("base", None)
        if base is None:
            return source
        if is_base:
            raise RunError(
                "a base file has a base of its own", where=source.where("base"), mend="use one level of base"
            )
        below = cls.read(path.parent / str(base), is_base=True)
        return cls(_merge(below.raw, source.raw), str(path), below.origins | source.origins)

    def override(self, arguments: list[str]) -> None:
        """Apply `--a.b=c` arguments; the value is read as YAML."""
        for argument in arguments:
            match = re.fullmatch(r"--([A-Za-z_][\w.-]*)=(.*)", argument, re.S)
            if not match:
                raise RunError(
                    f"'{argument}' is not understood", where="command line", mend="write --section.key=value"
                )
            key = match[1].replace("-", "_")
            *sections, last = key.split(".")
            node = self.raw
            for section in sections:
                child = node.setdefault(section, {})
                if not isinstance(child, dict):
                    raise RunError(f"{section} in {key} is no section", where="command line", mend="check the key")
                node = child
            try:
                node[last] = yaml.load(match[2], Loader=_Loader)
            except yaml.YAMLError:
                raise RunError(
                    f"the value of --{key} is no valid YAML", where="command line", mend="quote it"
                ) from None
            self.origins[key] = f"command line, --{key}"

    def where(self, key: str) -> str:
        """`file:line` of the key, or of the nearest section around it."""
        parts = key.split(".")
        while parts:
            name = ".".join(parts)
            if name in self.origins:
                return self.origins[name] + ("" if "command line" in self.origins[name] else f" ({key})")
            parts.pop()
        return f"{self.file} ({key})" if key else self.file

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            path = f"{prefix}.{key}" if prefix else key
            if key in result:
                raise RunError(
                    f"{path} stands twice", where=f"{self.file}:{key_node.start_mark.line + 1}", mend="remove one"
                )
            self.origins[path] = f"{self.file}:{key_node.start_mark.line + 1}"
            if isinstance(value_node, yaml.MappingNode):
                result[key] = self._mapping(value_node, path)
            else:
                constructor = _Loader("")
                result[key] = constructor.construct_object(value_node, deep=True)
        return result


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`; a section whose `name` changes replaces the one below whole."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = _merge(old, value)
        else:
            result[key] = value
    return result
