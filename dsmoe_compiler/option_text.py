"""The value of a pass's option as text, read and written by the type its field declares.

int 8 · float 0.5, 1e-06 · bool true, false · str relu, "two words" · Literal one of its choices ·
tuple {1,2,3}
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

_BARE = re.compile(r"""[^\s,{}="']+""")
_BOOLS = {"true": True, "false": False}


def read(kind: Any, values: tuple[str, ...]) -> object:
    """The values written for an option, unquoted, as its type has it. Raises ValueError or KeyError."""
    if get_origin(kind) is tuple:
        return tuple(_one(each, value) for each, value in zip(_elements(kind, values), values, strict=True))
    (value,) = values
    return _one(kind, value)


def write(value: object) -> str:
    """The text that `read` reads as `value`."""
    if isinstance(value, tuple):
        return "{" + ",".join(write(each) for each in value) + "}"
    text = _plain(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def describe(kind: Any) -> str:
    """A type for reading: "int", "auto | always", "{int, …}"."""
    match get_origin(kind), get_args(kind):
        case origin, (each, end) if origin is tuple and end is ...:
            return f"{{{describe(each)}, …}}"
        case origin, kinds if origin is tuple:
            return f"{{{', '.join(describe(each) for each in kinds)}}}"
        case origin, choices if origin is Literal:
            return " | ".join(write(choice) for choice in choices)
    return _name(kind)


def _elements(kind: Any, values: tuple[str, ...]) -> tuple[Any, ...]:
    kinds = get_args(kind)
    return (kinds[0],) * len(values) if kinds[-1:] == (...,) else kinds


def _one(kind: Any, value: str) -> object:
    if get_origin(kind) is Literal:
        return {_plain(choice): choice for choice in get_args(kind)}[value]
    if kind is bool:
        return _BOOLS[value.lower()]
    _name(kind)
    return kind(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no value an option can have in text")
    return str(value)


def _name(kind: Any) -> str:
    if kind not in (int, float, bool, str):
        raise TypeError(f"an option cannot be a {kind}: int, float, bool, str, Literal and tuple have a text")
    return str(kind.__name__)
