"""Kernels' text with branches decided."""

from __future__ import annotations

import ast

import pytest

from dsmoe_compiler.codegen import emit

TEXT = '''\
def f(a, b, FLAG, SIZE):
    """Of a and b."""
    # before
    if FLAG:
        # why so
        x = a  # here
    elif SIZE > 4:
        x = b
    else:
        # else why
        x = a + b
    return x
'''


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        ({"FLAG": True}, ["    # before", "    # why so", "    x = a  # here", "    return x"]),
        ({"FLAG": False, "SIZE": 8}, ["    # before", "    x = b", "    return x"]),
        ({"FLAG": False, "SIZE": 4}, ["    # before", "    # else why", "    x = a + b", "    return x"]),
    ],
)
def test_the_branch_that_is_taken_stays_with_its_comments(known: dict[str, object], kept: list[str]) -> None:
    assert emit.fold(TEXT, known).splitlines()[2:] == kept


def test_an_elif_that_is_known_below_an_if_that_is_not() -> None:
    taken, gone = emit.fold(TEXT, {"SIZE": 8}), emit.fold(TEXT, {"SIZE": 1})
    assert "elif" not in taken and "    else:\n        x = b\n" in taken and "a + b" not in taken
    assert "elif" not in gone and "x = b\n" not in gone and "x = a + b" in gone
    for text in (taken, gone):
        ast.parse(text)


def test_nothing_known_nothing_changed() -> None:
    assert emit.fold(TEXT, {}) == TEXT


@pytest.mark.parametrize(
    ("test", "known", "decided"),
    [
        ("A and B", {"A": False}, False),
        ("A or B", {"A": True}, True),
        ("A and B", {"A": True}, None),
        ("not A", {"A": 0}, True),
        ("A == 2", {"A": 2}, True),
        ("A != B", {"A": 2, "B": 3}, True),
        ("A > 1", {}, None),
    ],
)
def test_conditions(test: str, known: dict[str, object], decided: bool | None) -> None:
    value = emit.value(test, known)
    assert value is emit.UNKNOWN if decided is None else bool(value) is decided


def test_nested_decisions_and_expressions() -> None:
    text = "def f(a):\n    if A:\n        if B:\n            a = 1\n        return a if C else -a\n"
    assert emit.fold(text, {"A": True, "B": False, "C": True}) == "def f(a):\n    return a\n"


def test_parameters_that_nobody_reads_go_with_their_lines() -> None:
    text = "def f(\n    a,  # one\n    b,  # two\n    c,\n):\n    return a + c\n"
    assert emit.read_names(text) == {"a", "c"}
    kept = {"a": ["a"], "b": [], "c": ["c", "d"]}
    assert emit.with_parameters(text, kept) == (
        "def f(\n    a,  # one\n    c,\n    d,\n):\n    return a + c\n"
    )


def test_what_is_assigned_first_is_not_read() -> None:
    text = "def f(a, b):\n    a = g(b)\n    b = b + 1\n    return a + b\n"
    assert emit.read_names(text) == {"g", "b"}


def test_calls_are_written_anew_and_break_where_they_are_long() -> None:
    text = "def f(a):\n    return g(a, 1) + h[a](a)\n"

    def rewrite(source: str, call: ast.Call) -> tuple[str, list[str]] | None:
        long = ["a" * 30] * 4
        return {"g": ("g2", ["a"]), "h": ("h", long)}.get(str(emit.called(call)))

    written = emit.with_calls(text, rewrite)
    assert "g2(a) + h[a](\n" in written and max(map(len, written.splitlines())) <= emit.LINE
    ast.parse(written)


def test_constants_as_text() -> None:
    assert emit.literal(float("-inf")) == 'float("-inf")' and emit.literal(emit.Code("tl.int8")) == "tl.int8"
    assert emit.substitute("def f():\n    return N + 1\n", {"N": 3}) == "def f():\n    return 3 + 1\n"


def test_letters_of_more_than_a_byte_do_not_shift_the_text() -> None:
    text = 'def f(a):\n    """·"""\n    return (a if A else 0, "·", a if A else 1)\n'
    assert emit.fold(text, {"A": True}).endswith('return (a, "·", a)\n')


def test_values_that_nothing_reads_go() -> None:
    kept = "    kept = g(a)\n    count = 0\n    count += b\n    return b\n"
    text = f"def f(a, b):\n    last = a\n    first = last\n{kept}"
    assert emit.without_unread(text) == f"def f(a, b):\n{kept}"


def test_a_block_keeps_its_only_statement() -> None:
    text = "def f(a):\n    if a:\n        b = a\n    return a\n"
    assert emit.without_unread(text) == text
