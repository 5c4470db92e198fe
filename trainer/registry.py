"""A folder with alternatives is its registry: a file that defines `class Options` is one alternative.

The alternative's name is its file's name. Such a file gets torch through `lazy`, so that configuration loads without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ConfigDict

# How every section of the configuration is checked: no unknown key, no guessing between types. A plain mapping: pydantic
# takes 0.1 s to load, and not everything that is listed here needs it.
STRICT: ConfigDict = {"extra": "forbid", "use_attribute_docstrings": True, "strict": True}


class _Lazy(ModuleType):
    """A module that is imported when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


def lazy(name: str) -> Any:
    """The module `name`, imported at its first use (unlike importlib's LazyLoader it leaves sys.modules alone)."""
    return _Lazy(name)


@cache
def names(package: str) -> list[str]:
    """The names of the alternatives in `package`; none of them is imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    files = sorted(Path((spec.submodule_search_locations or [])[0]).glob("*.py"))
    return [file.stem for file in files if re.search(r"^(class )?Options\b", file.read_text(encoding="utf-8"), re.M)]


@cache
def alternatives(package: str) -> dict[str, ModuleType]:
    """The modules of `package` that define `Options`, by name."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}
