"""The kernels' own text: every function of codegen/kernels by name, read from its file, not imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Source:
    """A function's text, decorators included, its parameters, and the functions of the library it may call,
    by the name it calls them: (module, function).
    """

    module: str
    name: str
    text: str
    parameters: tuple[str, ...]
    seen: dict[str, tuple[str, str]]


_ROOM = "dsmoe_compiler.codegen.kernels"


@cache
def module(name: str) -> dict[str, Source]:
    """The functions of codegen/kernels/{name}.py."""
    text = files(_ROOM).joinpath(f"{name}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    seen = {f.name: (name, f.name) for f in functions}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_ROOM}."):
            where = str(node.module).rpartition(".")[2]
            seen |= {a.asname or a.name: (where, a.name) for a in node.names}
    found = {}
    for f in functions:
        first = min([f.lineno, *(d.lineno for d in f.decorator_list)])
        own = "\n".join(lines[first - 1 : f.end_lineno]) + "\n"
        found[f.name] = Source(name, f.name, own, tuple(a.arg for a in f.args.args), seen)
    return found


def source(module_name: str, function: str) -> Source:
    """One function of the library."""
    return module(module_name)[function]
