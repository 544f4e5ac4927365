"""Prints kernels with what is known about a layer decided: the same lines and comments, without the other
branches.

Works on the text of functions, guided by their syntax trees, so that comments and layout survive:

    if TMA:                                        with TMA known to be false
        tile = weight.load([expert, n, k])
    else:                                          tile = tl.load(weight + place, mask=inside)
        tile = tl.load(weight + place, mask=inside)

A parameter that nothing reads any more goes, from the signature and from every call.
"""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Constants = Mapping[str, object]
LINE = 110


class Code(str):
    """A constant's text where its `repr` is not what stands for it: `tl.bfloat16`."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Parameter:
    """One of a function's parameters: its name and its text in the signature, annotation included."""

    name: str
    text: str


def literal(value: object) -> str:
    """A constant as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def fold(source: str, constants: Constants) -> str:
    """A function's text with every branch decided that `constants` decide. Raises SyntaxError on bad text."""
    while (
        decided := _first(source, lambda n: isinstance(n, ast.If) and _known(n.test, constants))
    ) is not None:
        assert isinstance(decided, ast.If)
        source = _without_branch(source, decided, bool(_value(decided.test, constants)))
    while (
        chosen := _first(source, lambda n: isinstance(n, ast.IfExp) and _known(n.test, constants))
    ) is not None:
        assert isinstance(chosen, ast.IfExp)
        kept = chosen.body if _value(chosen.test, constants) else chosen.orelse
        source = replaced(source, {chosen: segment(source, kept)})
    return source


def substitute(source: str, constants: Constants) -> str:
    """A function's text with every name that is a constant replaced by its value."""
    tree = ast.parse(source)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in constants]
    return replaced(source, {n: literal(constants[n.id]) for n in names})


def parameters(source: str) -> list[Parameter]:
    """A function's parameters, in order."""
    arguments = _function(source).args.args
    return [Parameter(a.arg, segment(source, a)) for a in arguments]


def read_names(source: str) -> set[str]:
    """The names that a function's body reads before it assigns them."""
    loads, stores = dict[str, int](), dict[str, int]()
    for node in (n for s in _function(source).body for n in ast.walk(s)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            loads[node.id] = min(node.lineno, loads.get(node.id, node.lineno))
        elif isinstance(node, ast.Assign):
            own = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            targets = (n for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
            for target in (t for t in targets if isinstance(t.ctx, ast.Store) and t.id not in own):
                stores[target.id] = min(node.lineno, stores.get(target.id, node.lineno))
    return {name for name, line in loads.items() if stores.get(name, line) >= line}


def without_unread(source: str) -> str:
    """A function's text without the local values that nothing reads any more."""
    while (unread := _unread(_function(source))) is not None:
        lines = source.splitlines()
        del lines[unread.lineno - 1 : unread.end_lineno]
        source = "\n".join(lines) + "\n"
    return source


def _unread(function: ast.FunctionDef) -> ast.Assign | None:
    """An assignment that can go: it calls nothing, and is not all of a block."""
    nodes = list(ast.walk(function))
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    read |= {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    for node in nodes:
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for statement in block if isinstance(block, list) and len(block) > 1 else ():
                match statement:
                    case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in read:
                        if not any(isinstance(n, ast.Call) for n in ast.walk(value)):
                            return statement
    return None


def with_parameters(source: str, kept: Mapping[str, Sequence[str]]) -> str:
    """A function's text in which each parameter is replaced by those that `kept` gives for it, or by none.

    Where the signature has a line for each parameter, the lines of those that stay keep their comments.
    """
    function = _function(source)
    lines = source.splitlines()
    old = function.args.args
    end = _signature_end(lines, function)
    listed = len({a.lineno for a in old}) == len(old) and all(a.lineno > function.lineno for a in old)
    texts = {a.arg: segment(source, a) for a in old}
    if not listed:
        new = [texts.get(name, name) for a in old for name in kept.get(a.arg, ())]
        head = call_text(f"def {function.name}", new, len(":"), 0)
        return "\n".join([*lines[: function.lineno - 1], *f"{head}:".splitlines(), *lines[end + 1 :]]) + "\n"
    gone = {a.lineno - 1 for a in old if not kept.get(a.arg)}
    wider = {a.lineno - 1: kept[a.arg] for a in old if kept.get(a.arg) and kept[a.arg] != [a.arg]}
    signature = [
        text
        for i in range(function.lineno - 1, end + 1)
        if i not in gone
        for text in ([f"    {name}," for name in wider[i]] if i in wider else [lines[i]])
    ]
    return "\n".join([*lines[: function.lineno - 1], *signature, *lines[end + 1 :]]) + "\n"


def renamed(source: str, name: str) -> str:
    """A function's text under another name."""
    return source.replace(f"def {_function(source).name}(", f"def {name}(", 1)


def with_calls(source: str, rewrite: Callable[[str, ast.Call], tuple[str, list[str]] | None]) -> str:
    """A function's text with its calls rewritten.

    `rewrite(text, call)` gives the new name and arguments of a call of a name, or of a launch,
    `name[grid](…)`; None leaves it.
    """
    done = 0
    while True:
        calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        calls.sort(key=lambda n: (n.lineno, n.col_offset))
        if done == len(calls):
            return source
        call = calls[done]
        done += 1
        if called(call) is None or (new := rewrite(source, call)) is None:
            continue
        line = source.splitlines()[call.lineno - 1]
        indent = len(line) - len(line.lstrip())
        before = line[indent : _column(line, call.col_offset)]
        grid = f"[{segment(source, call.func.slice)}]" if isinstance(call.func, ast.Subscript) else ""
        after = len(source.splitlines()[(call.end_lineno or 1) - 1]) - (call.end_col_offset or 0)
        text = call_text(f"{before}{new[0]}{grid}", new[1], after, indent)
        source = replaced(source, {call: text[len(before) :]})


def called(call: ast.Call) -> str | None:
    """The name that a call calls or launches; None when it is not a name."""
    name = call.func.value if isinstance(call.func, ast.Subscript) else call.func
    return name.id if isinstance(name, ast.Name) else None


def _signature_end(lines: Sequence[str], function: ast.FunctionDef) -> int:
    """Index of the signature's last line."""
    return next(
        i for i in range(function.lineno - 1, len(lines)) if lines[i].split("#")[0].rstrip().endswith(":")
    )


def call_text(head: str, arguments: Sequence[str], after: int, indent: int) -> str:
    """`head(arguments)` on one line where it and `after` more characters fit, else as ruff breaks it."""
    whole = f"{head}({', '.join(arguments)})"
    if indent + len(whole) + after <= LINE and not any("\n" in a for a in arguments):
        return whole
    inner, outer = " " * (indent + 4), " " * indent
    together = ", ".join(arguments)
    if len(inner) + len(together) <= LINE and not head.startswith("def ") and "\n" not in together:
        return f"{head}(\n{inner}{together}\n{outer})"
    listed = "".join(f"{inner}{a},\n" for a in arguments)
    return f"{head}(\n{listed}{outer})"


def segment(source: str, node: ast.AST) -> str:
    """A node's text."""
    found = ast.get_source_segment(source, node)
    assert found is not None
    return found


def replaced(source: str, new: Mapping[ast.expr, str]) -> str:
    """The text with nodes replaced, of which none lies in another."""
    lines = source.splitlines(keepends=True)
    for node, text in sorted(
        new.items(), key=lambda item: (item[0].lineno, item[0].col_offset), reverse=True
    ):
        assert node.end_lineno is not None and node.end_col_offset is not None
        first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
        start, stop = _column(first, node.col_offset), _column(last, node.end_col_offset)
        lines[node.lineno - 1 : node.end_lineno] = [first[:start] + text + last[stop:]]
        source = "".join(lines)
        lines = source.splitlines(keepends=True)
    return source


def _column(line: str, byte: int) -> int:
    """The character that a syntax tree's column, which counts bytes, stands for."""
    return len(line.encode()[:byte].decode())


def _function(source: str) -> ast.FunctionDef:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    return function


def _first(source: str, wanted: Callable[[ast.AST], bool]) -> ast.AST | None:
    return next((n for n in _in_order(ast.parse(source)) if wanted(n)), None)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """A tree's nodes as they are written, outer ones first."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _without_branch(source: str, decided: ast.If, taken: bool) -> str:
    """The text with an `if` replaced by the branch that is taken."""
    lines = source.splitlines()
    assert decided.end_lineno is not None and decided.test.end_lineno is not None
    is_elif = lines[decided.lineno - 1].lstrip().startswith("elif")
    middle = _else_line(lines, decided)
    body = lines[decided.test.end_lineno : middle]
    other = lines[middle : decided.end_lineno]
    if is_elif:  # the outer `if` is not decided: its branches stay as they are indented
        indent = " " * decided.col_offset
        new = [f"{indent}else:", *body] if taken else other
    elif taken:
        new = _indented(body, decided.col_offset)
    elif other and other[0].lstrip().startswith("elif"):
        new = [other[0].replace("elif", "if", 1), *other[1:]]
    else:
        new = _indented(other[1:], decided.col_offset)
    lines[decided.lineno - 1 : decided.end_lineno] = new
    return "\n".join(lines) + "\n"


def _else_line(lines: Sequence[str], node: ast.If) -> int:
    """Index of the line with the `else` or `elif`, or of the line past the block when there is none."""
    assert node.end_lineno is not None
    if not node.orelse:
        return node.end_lineno
    start = node.orelse[0].lineno - 1
    if lines[start].lstrip().startswith("elif") and lines[start].index("elif") == node.col_offset:
        return start
    return next(i for i in range(start, node.lineno - 1, -1) if lines[i].strip() == "else:")


def _indented(lines: Sequence[str], by: int) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), " " * by).splitlines()


UNKNOWN = object()


def value(text: str, constants: Constants) -> object:
    """What an expression is, as far as the constants say; UNKNOWN where they do not."""
    return _value(ast.parse(text, mode="eval").body, constants)


def _known(test: ast.expr, constants: Constants) -> bool:
    return _value(test, constants) is not UNKNOWN


def _value(test: ast.expr, constants: Constants) -> object:
    """What a condition is, as far as the constants say."""
    match test:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return constants.get(name, UNKNOWN)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _value(operand, constants)
            return inner if inner is UNKNOWN else not inner
        case ast.BoolOp(op=op, values=parts):
            values = [_value(p, constants) for p in parts]
            decides = isinstance(op, ast.Or)
            if any(v is not UNKNOWN and bool(v) is decides for v in values):
                return decides
            return UNKNOWN if UNKNOWN in values else not decides
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            a, b = _value(left, constants), _value(right, constants)
            if UNKNOWN in (a, b):
                return UNKNOWN
            return _COMPARE[type(op)](a, b)
    return UNKNOWN


_COMPARE: Mapping[type[ast.cmpop], Callable[[object, object], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Gt: lambda a, b: a > b,  # type: ignore[operator]
    ast.GtE: lambda a, b: a >= b,  # type: ignore[operator]
    ast.Lt: lambda a, b: a < b,  # type: ignore[operator]
    ast.LtE: lambda a, b: a <= b,  # type: ignore[operator]
}
