"""What tracing assumed of the sizes beyond their ranges: conditions that a call must meet.

torch.export writes them down as Python: `L['x'].size()[0] > L['y'].size()[0]`. They travel in saved files,
so only arithmetic and comparisons of sizes are ever evaluated.
"""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType

# A flat input as the guard names it, and one of its dimensions.
Dimension = tuple[str, int]

_ATOM = re.compile(r"(L(?:\[(?:'[^']*'|\d+)\])+)\.size\(\)\[(\d+)\]")
_FUNCTIONS = {"max": max, "min": min, "math": math}
_ALLOWED = (
    ast.Expression,
    ast.BoolOp,
    ast.boolop,
    ast.UnaryOp,
    ast.unaryop,
    ast.BinOp,
    ast.operator,
    ast.Compare,
    ast.cmpop,
    ast.Constant,
    ast.Name,
    ast.Load,
)


@dataclass(frozen=True)
class Condition:
    """`text` in the user's words, `sizes` the dimensions it is about, `code` the same over s0, s1, …

    `doubtful`: it fails at sizes 0 and 1 only, those of the inputs or of dimensions taken together (a view
    as rows of 16: `x.shape[0] * x.shape[1] // 16 != 1`). torch assumes `!= 1` of sizes whether the model
    cares or not, to settle questions of memory layout and broadcasting.
    """

    text: str
    doubtful: bool
    sizes: tuple[Dimension, ...]
    code: CodeType

    def holds(self, sizes: Mapping[Dimension, int]) -> bool:
        """Whether these sizes meet it; a division by a size of 0 does not."""
        values = {f"s{i}": sizes[s] for i, s in enumerate(self.sizes)}
        try:
            return bool(eval(self.code, {"__builtins__": {}, **_FUNCTIONS}, values))
        except ArithmeticError:
            return False


def conditions(
    guards: Iterable[str], names: Mapping[str, str], fixed: Mapping[Dimension, int] | None = None
) -> tuple[Condition, ...]:
    """The guards that speak of sizes of the inputs in `names`, from the guard's name of an input to the
    user's.

    `fixed` holds the dimensions that have one size only.
    """
    found = (_condition(guard, names, fixed or {}) for guard in guards)
    return tuple(condition for condition in found if condition is not None)


def _condition(guard: str, names: Mapping[str, str], fixed: Mapping[Dimension, int]) -> Condition | None:
    sizes = tuple(dict.fromkeys((name, int(dim)) for name, dim in _ATOM.findall(guard)))
    if not sizes or any(name not in names for name, _ in sizes):
        return None
    code = _ATOM.sub(lambda atom: f"s{sizes.index((atom[1], int(atom[2])))}", guard)
    tree = ast.parse(code.strip(), mode="eval")
    if not all(isinstance(node, _ALLOWED) or _is_function(node) for node in ast.walk(tree)):
        return None
    text = _ATOM.sub(lambda atom: f"{names[atom[1]]}.shape[{atom[2]}]", guard)
    text = ast.unparse(ast.parse(text.strip(), mode="eval"))
    condition = Condition(text, False, sizes, compile(tree, "<guard>", "eval"))
    never_large = all(condition.holds(large) for large in _larger(sizes, tree, fixed))
    return replace(condition, doubtful=never_large or _holds_of_views(tree))


def _holds_of_views(tree: ast.Expression) -> bool:
    """Whether a condition on nothing but sizes divided by numbers holds wherever these quotients, which are
    the sizes of a view's dimensions, are 2 and more.
    """
    views = _Views()
    over = views.visit(copy.deepcopy(tree))
    names = [n.id for n in ast.walk(over) if isinstance(n, ast.Name)]
    if not views.names or not all(name in views.names.values() or name in _FUNCTIONS for name in names):
        return False
    code = compile(ast.fix_missing_locations(over), "<guard>", "eval")
    sizes = tuple((name, 0) for name in views.names.values())
    return all(
        eval(code, {"__builtins__": {}, **_FUNCTIONS}, {name: n for (name, _), n in large.items()})
        for large in _larger(sizes, over, {})
    )


class _Views(ast.NodeTransformer):
    """Gives every quotient by a number a name of its own."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.FloorDiv) or not isinstance(node.right, ast.Constant):
            return self.generic_visit(node)
        return ast.Name(self.names.setdefault(ast.dump(node), f"v{len(self.names)}"), ast.Load())


def _larger(
    sizes: tuple[Dimension, ...], tree: ast.AST, fixed: Mapping[Dimension, int]
) -> Iterator[dict[Dimension, int]]:
    """Sizes of 2 and more at which a condition may fail: small ones, and those that its own numbers point
    to.
    """
    numbers = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int]
    quotients = [a // b for a in numbers for b in numbers if b > 0]
    tried = sorted({n for n in (*range(2, 10), *numbers, *quotients) if n > 1})
    together = (
        itertools.product(tried, repeat=len(sizes))
        if len(sizes) < 3
        else zip(*[tried] * len(sizes), strict=True)
    )
    return ({s: fixed.get(s, n) for s, n in zip(sizes, chosen, strict=True)} for chosen in together)


def _is_function(node: ast.AST) -> bool:
    """A call of min, max or a function of math, or that function's name."""
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "math" and not node.attr.startswith("_")
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return not node.keywords and (named or _is_function(node.func))
    return False
