"""Every proof obligation of the passes, found in their source, and the module without it.

    raise Unproven(…)                      -> pass                 "raise"
    require_distinct(ids)                  -> pass                 "require"
    if a or b: return None                 -> if b: return None    "guard", one mutant for each operand
    return x if a and b else None          -> return x if b …      "guard"

A rule that is written tomorrow has its obligations here without a line being added.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES: tuple[str, ...] = (
    *(f"passes/lift/{path.name}" for path in sorted((ROOT / "passes/lift").glob("[a-z]*.py"))),
    *(f"passes/{name}.py" for name in ("lift_experts", "fuse_router", "fuse_shared_experts", "region")),
)
_REFUSALS = ("Unproven", "_Unknown")
KINDS = ("raise", "require", "guard")


@dataclass(frozen=True)
class Mutant:
    """One obligation: where it is and what it says; `number` counts the obligations of its file."""

    file: str
    function: str
    line: int
    kind: str
    text: str
    number: int
    again: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called where lines and codes move; numbered where a function says it more than once."""
        text = re.sub(r"'R\d+', ", "", self.text) + (f" ({self.again})" if self.again > 1 else "")
        return self.file.rpartition("/")[2], self.function, text

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.kind} {self.text}"


def module_of(file: str) -> str:
    """The dotted name a file is imported by."""
    return "dsmoe_compiler." + file.removesuffix(".py").replace("/", ".")


def mutants(file: str) -> list[Mutant]:
    """All obligations of a file."""
    found, said = list[Mutant](), Counter[tuple[str, str]]()
    for number, site in enumerate(_sites(_parsed(file))):
        said[site.function, site.words] += 1
        again = said[site.function, site.words]
        line = site.statement.lineno
        found.append(Mutant(file, site.function, line, site.kind, site.words, number, again))
    return found


def mutated(mutant: Mutant) -> ast.Module:
    """The file's tree without the obligation."""
    tree = _parsed(mutant.file)
    site = _sites(tree)[mutant.number]
    gone = ast.Constant(not site.refuses_if) if site.kind == "guard" else ast.Pass()
    _Swap({site.said if site.kind == "guard" else site.statement: [gone]}).visit(tree)
    return ast.fix_missing_locations(tree)


def observed(file: str) -> ast.Module:
    """The file's tree with a call of `_refuses(number, …)` wherever an obligation is about to refuse."""
    tree = _parsed(file)
    swaps = dict[ast.AST, list[ast.AST]]()
    for number, site in enumerate(_sites(tree)):
        if site.kind == "guard":
            swaps[site.said] = [_call(number, site.said, ast.Constant(site.refuses_if))]
        elif site.kind == "raise":
            swaps[site.statement] = [ast.Expr(_call(number)), site.statement]
        else:
            noted = ast.ExceptHandler(None, None, [ast.Expr(_call(number)), ast.Raise()])
            swaps[site.statement] = [ast.Try([site.statement], [noted], [], [])]
    _Swap(swaps).visit(tree)
    return ast.fix_missing_locations(tree)


def _call(number: int, *arguments: ast.AST) -> ast.Call:
    return ast.Call(ast.Name("_refuses", ast.Load()), [ast.Constant(number), *arguments], [])  # type: ignore[list-item]


def _parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@dataclass(frozen=True)
class _Site:
    """An obligation in a tree: its statement, the call or operand that says it, and (of a guard) with which
    value it refuses.
    """

    function: str
    kind: str
    statement: ast.stmt
    said: ast.AST
    refuses_if: bool = True

    @property
    def words(self) -> str:
        return " ".join(ast.unparse(self.said).split())


def _sites(tree: ast.Module) -> list[_Site]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [site for f in functions for node in ast.walk(f) for site in _of(f.name, node)]


def _of(function: str, node: ast.AST) -> Iterator[_Site]:
    match node:
        case ast.Raise(exc=ast.Call(func=ast.Name(id=name)) as call) if name in _REFUSALS:
            yield _Site(function, "raise", node, call)
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) as call):
            if "require_" in name:
                yield _Site(function, "require", node, call)
        case ast.If(body=[ast.Return(value=None | ast.Constant(value=None | False)) | ast.Continue()]):
            for operand in _operands(node.test, ast.Or):
                yield _Site(function, "guard", node, operand)
        case ast.Return(value=ast.IfExp(orelse=ast.Constant(value=None)) as choice):
            for operand in _operands(choice.test, ast.And):
                yield _Site(function, "guard", node, operand, refuses_if=False)


def _operands(test: ast.expr, joined: type[ast.boolop]) -> list[ast.expr]:
    """What is joined by `or` or `and`, without what names a value for later."""
    operands = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, joined) else [test]
    return [o for o in operands if not any(isinstance(n, ast.NamedExpr) for n in ast.walk(o))]


class _Swap(ast.NodeTransformer):
    """Puts nodes in the place of others."""

    def __init__(self, swaps: dict[ast.AST, list[ast.AST]]) -> None:
        self.swaps = swaps

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        new = self.swaps.pop(node, None)
        if new is None:
            found: ast.AST = self.generic_visit(node)
            return found
        for part in new:
            ast.copy_location(part, node)
            self.generic_visit(part)
        return new if isinstance(node, ast.stmt) else new[0]
