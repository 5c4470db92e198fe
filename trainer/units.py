"""Human quantities of the configuration: `1B`, `350M`, `600 steps`, `30 min`, `11h30m`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hours": 3600, "hour": 3600, "d": 86400, "days": 86400}
_LENGTHS = ("steps", "tokens", "epochs")


def parse_count(value: Any) -> Any:
    """`350M` -> 350000000. Numbers pass; what is no count is left for the type check to refuse."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKmMbBgGtT]?)\s*", value)
        if not match:
            raise ValueError(f"'{value}' is no count; write 4096, 350M or 1B")
        number = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
        if not number.is_integer():
            raise ValueError(f"'{value}' is no whole number")
        return int(number)
    return value


def parse_seconds(value: Any) -> Any:
    """`11h30m`, `30 min`, `45 s` -> seconds. A bare number is refused: its unit would be a guess."""
    if value is None:
        return None
    text = str(value).strip().lower()
    if not re.fullmatch(r"(\d+(\.\d+)?\s*[a-z]+\s*)+", text):
        raise ValueError(f"'{value}' is no duration; write 45 s, 30 min or 11h30m")
    total = 0.0
    for number, unit in re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text):
        if unit not in _SECONDS:
            raise ValueError(f"'{unit}' is no unit of time; use s, min, h or d")
        total += float(number) * _SECONDS[unit]
    return total


def split_length(text: str) -> tuple[float, str]:
    """`600 steps` -> (600, "steps"); `1B tokens` -> (1e9, "tokens"); `2.5 epochs` -> (2.5, "epochs").

    `3 epochs of web`, passes over one source of a mixture, has the unit "epochs of web".
    """
    match = re.fullmatch(r"\s*(\S+?)\s*(steps?|tokens?|epochs?)(\s+of\s+(\w+))?\s*", text)
    if not match or (match[3] and not match[2].startswith("epoch")):
        raise ValueError(f"'{text}' is no length; write 600 steps, 1B tokens or 3 epochs")
    unit = match[2] if match[2].endswith("s") else match[2] + "s"
    number = float(match[1]) if unit == "epochs" else float(parse_count(match[1]))
    if not number > 0:
        raise ValueError(f"'{text}': a length is above zero")
    return number, f"{unit} of {match[4]}" if match[4] else unit


def _length(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"'{value}' has no unit; write for example '{value} steps'")
    number, unit = split_length(value)
    return f"{number:g} {unit}" if number < 1e5 else f"{number:.0f} {unit}"


def split_interval(text: str) -> tuple[float, str]:
    """`500 steps` -> (500, "steps"); `30 min` -> (1800, "seconds")."""
    match = re.fullmatch(r"\s*(\d\S*?)\s*steps?\s*", text)
    if match:
        steps = parse_count(match[1])
        if steps < 1:
            raise ValueError(f"'{text}': an interval is above zero")
        return steps, "steps"
    seconds: float = parse_seconds(text)
    if seconds <= 0:
        raise ValueError(f"'{text}': an interval is above zero")
    return seconds, "seconds"


def _interval(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"'{value}' has no unit; write for example '{value} steps' or '{value} min'")
    split_interval(value)
    return value.strip()


def parse_share(value: Any) -> Any:
    """A share from 0 to 1 as a number (`0.3`) or as a fraction (`1/3`); both are taken exactly."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"'{value}' is no share; write 0.3 or 1/3")
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is no share; write 0.3 or 1/3") from None
    if not 0 <= share <= 1:
        raise ValueError(f"'{value}': a share is from 0 to 1")
    return value.strip() if isinstance(value, str) else float(value)


_COUNT_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[\d_.]+\s*[kKmMbBgGtT]?$"}]
}
_TEXT_SCHEMA = {"type": "string"}
_SHARE_SCHEMA = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^\d+\s*/\s*\d+$"},
    ]
}

Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema(_COUNT_SCHEMA)]
Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds),
    PlainSerializer(lambda seconds: f"{seconds:g} s", return_type=str, when_used="json"),
    WithJsonSchema(_TEXT_SCHEMA),
]
Length = Annotated[str, BeforeValidator(_length), WithJsonSchema(_TEXT_SCHEMA)]
Interval = Annotated[str, BeforeValidator(_interval), WithJsonSchema(_TEXT_SCHEMA)]
Share = Annotated[float | str, BeforeValidator(parse_share), WithJsonSchema(_SHARE_SCHEMA)]
