"""A pipeline as one line of text, both ways:

    normalize,lift_experts,some_pass{count=4 names={a,b} exact=true}

Passes stand in execution order. In braces stand options, separated by spaces: the fields of the pass's
dataclass, each of the type it declares (`option_text.py`). Those not named keep their defaults; the bare name
of a bool is true. A value that is no plain word is quoted: "like this" with JSON's escapes, 'like this' with
none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from dsmoe_compiler import option_text
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.nearest import unknown

_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[,{}=])|(?P<quoted>"(?:[^"\\]|\\.)*"|'[^']*')|(?P<word>[^\s,{}="']+)|(?P<end>$))"""
)


@dataclass(frozen=True)
class Option:
    """A field of a pass: its name, declared type, and default (MISSING where it has none)."""

    name: str
    kind: Any
    default: object

    def __str__(self) -> str:
        default = "" if self.default is MISSING else f" = {option_text.write(self.default)}"
        return f"{self.name} : {option_text.describe(self.kind)}{default}"


def options(step: type[Pass]) -> tuple[Option, ...]:
    """What can stand in a pass's braces, in the order of its fields."""
    if not is_dataclass(step):
        return ()
    kinds = get_type_hints(step)
    made = ((f, f.default_factory) for f in fields(step) if f.init)
    return tuple(Option(f.name, kinds[f.name], f.default if make is MISSING else make()) for f, make in made)


def print_pipeline(steps: Sequence[Pass]) -> str:
    """The line that `parse` reads as these passes; every option is spelled out."""
    return ",".join(_print_one(step) for step in steps)


def parse(text: str, known: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """The passes that a line names, made with its options. Raises InputError, one line, on anything else."""
    return _Reader(text, known).pipeline()


def _print_one(step: Pass) -> str:
    values = [f"{o.name}={option_text.write(getattr(step, o.name))}" for o in options(type(step))]
    return f"{step.name}{{{' '.join(values)}}}" if values else step.name


@dataclass(frozen=True)
class _Token:
    """`kind` is the mark itself, "word", "quoted" or "end"; `text` a quoted value without its quotes."""

    kind: str
    text: str
    at: int


class _Reader:
    """Reads one line from left to right, one token ahead."""

    def __init__(self, line: str, known: Mapping[str, type[Pass]]) -> None:
        self._line, self._known = line, known
        self._next = self._token(0)

    def pipeline(self) -> tuple[Pass, ...]:
        if self._next.kind == "end":
            return ()
        steps = [self._step()]
        while self._next.kind == ",":
            self._take(",")
            steps.append(self._step())
        if self._next.kind != "end":
            raise self._wrong("',' before the next pass")
        return tuple(steps)

    def _step(self) -> Pass:
        name = self._take("word", "the name of a pass").text
        if name not in self._known:
            raise self._error(unknown("pass", name, self._known))
        step = self._known[name]
        try:
            return step(
                **(self._options(name, step) if self._next.kind == "{" else self._given(name, step, {}))
            )
        except ValueError as e:  # the pass's own objection to values of the right type
            raise self._error(f"{name}: {e}") from e

    def _options(self, name: str, step: type[Pass]) -> dict[str, object]:
        opening = self._take("{")
        known, given = {o.name: o for o in options(step)}, dict[str, object]()
        while self._next.kind != "}":
            if self._next.kind == "end":
                raise self._error(f"the '{{' at character {opening.at + 1} is never closed")
            key = self._take("word", f"an option of {name} or '}}'").text
            if key not in known:
                raise self._error(f"{name}: {unknown('option', key, known)}")
            if key in given:
                raise self._error(f"{name}: option {key!r} is given twice")
            given[key] = self._value(name, known[key])
        self._take("}")
        return self._given(name, step, given)

    def _given(self, name: str, step: type[Pass], given: dict[str, object]) -> dict[str, object]:
        """The options given. Raises InputError when one without a default is not among them."""
        missing = [o for o in options(step) if o.default is MISSING and o.name not in given]
        if missing:
            raise self._error(f"{name} needs its option {missing[0]}")
        return given

    def _value(self, name: str, option: Option) -> object:
        if self._next.kind != "=":
            written: tuple[str, ...] = ("true",) if option.kind is bool else ()
        else:
            self._take("=")
            written = self._values(f"the value of {option.name}")
        try:
            return option_text.read(option.kind, written)
        except (ValueError, KeyError) as e:
            shown = " ".join(map(repr, written)) or "nothing"
            wanted = option_text.describe(option.kind)
            raise self._error(f"{name}: option {option.name!r} wants {wanted}, not {shown}") from e

    def _values(self, what: str) -> tuple[str, ...]:
        """One value, or several separated by commas, perhaps in braces of their own."""
        braced = self._next.kind == "{"
        if braced:
            self._take("{")
        values = list[str]()
        if not (braced and self._next.kind == "}"):
            values.append(self._take("value", what).text)
            while self._next.kind == ",":
                self._take(",")
                values.append(self._take("value", what).text)
        if braced:
            self._take("}")
        return tuple(values)

    def _take(self, kind: str, what: str = "") -> _Token:
        taken = self._next
        if taken.kind not in (("word", "quoted") if kind == "value" else (kind,)):
            raise self._wrong(what or f"'{kind}'")
        self._next = self._token(self._end)
        return taken

    def _token(self, at: int) -> _Token:
        found = _TOKEN.match(self._line, at)
        if found is None:
            start = at + len(self._line[at:]) - len(self._line[at:].lstrip())
            raise self._error(f"the quote at character {start + 1} is never closed")
        self._end = found.end()
        kind = str(found.lastgroup)
        text, start = found[kind], found.start(kind)
        if kind == "quoted":
            return _Token(kind, self._unquoted(text, start), start)
        return _Token(text if kind == "mark" else kind, text, start)

    def _unquoted(self, text: str, at: int) -> str:
        try:
            return text[1:-1] if text.startswith("'") else str(json.loads(text, strict=False))
        except ValueError as e:
            raise self._error(f"the text at character {at + 1} has an escape that JSON does not know") from e

    def _wrong(self, wanted: str) -> InputError:
        found = self._next
        got = "it ends" if found.kind == "end" else f"there is {found.text!r}"
        return self._error(f"{got} at character {found.at + 1} where {wanted} should stand")

    def _error(self, what: str) -> InputError:
        return InputError(f"pipeline {self._line!r}: {what}")
