"""Write what is made from the code: `configs/schema.json` and `docs/config.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer import config as configuration

ROOT = Path(__file__).parents[1]


def schema_text() -> str:
    """The JSON schema of a run's YAML file."""
    return json.dumps(configuration.json_schema(), indent=1) + "\n"


def markdown() -> str:
    """Every key with its meaning, type and default."""
    schema = configuration.json_schema()
    lines = [
        "# Configuration",
        "",
        "Made by `make schema` from `trainer/config.py`; do not edit. One YAML file is one run; `--section.key=value` on",
        "the command line overrides it, through the same checks. Counts take `350M` or `1B`, lengths `600 steps`,",
        "`1B tokens` or `3 epochs`, intervals `500 steps` or `30 min`. `base: FILE` puts another file below this one.",
        "",
        f"A resume may change: {', '.join(f'`{key}`' for key in configuration.CHANGEABLE)}. All else is what the run is.",
    ]
    _section("", schema, schema, lines)
    return "\n".join(lines) + "\n"


def _section(prefix: str, node: Any, schema: Any, lines: list[str]) -> None:
    inner = []
    if prefix:
        lines += ["", f"## {prefix}", "", node.get("description", "").split("\n")[0]]
    lines += ["", "| key | default | meaning |", "|---|---|---|"]
    for key, value in node.get("properties", {}).items():
        path = f"{prefix}.{key}" if prefix and not prefix.endswith(")") else f"{prefix.split(' ')[0]}.{key}".lstrip(".")
        if "discriminator" in value:
            mapping = value["discriminator"]["mapping"]
            lines.append(
                f"| `{path}.name` | | {value.get('description', '')} One of {', '.join(f'`{m}`' for m in mapping)}. |"
            )
            inner += [(f"{path} (name: {name})", _resolve({"$ref": ref}, schema)) for name, ref in mapping.items()]
        elif "patternProperties" in value:
            lines.append(f"| `{path}` | none | {_one_line(value.get('description', ''))} |")
            inner.append((f"{path}.NAME", _resolve(next(iter(value["patternProperties"].values())), schema)))
        elif "$ref" in value or any("$ref" in one for one in value.get("anyOf", ())):
            value = next((one for one in value.get("anyOf", ()) if "$ref" in one), value)
            inner.append((path, _resolve(value, schema)))
        else:
            empty = "required" if key in node.get("required", ()) else "`[]`" if "items" in value else "`{}`"
            default = f"`{json.dumps(value['default'])}`" if "default" in value else empty
            mapping = value.get("items", {}).get("discriminator", {}).get("mapping", {})
            inner += [(f"{path} (name: {name})", _resolve({"$ref": ref}, schema)) for name, ref in mapping.items()]
            lines.append(f"| `{path}` | {default} | {_one_line(value.get('description', ''))} |")
    for name, child in inner:
        _section(name, child, schema, lines)


def _resolve(node: Any, schema: Any) -> Any:
    return schema["$defs"][node["$ref"].rpartition("/")[2]]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "configs" / "schema.json").write_text(schema_text())
    (ROOT / "docs" / "config.md").write_text(markdown())
