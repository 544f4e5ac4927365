"""The expert's maths as a small term over its weights.

A `Body` is a straight-line program in value-numbered form: step *i* applies one operator to earlier steps,
the last step is the result. It describes one row: `x` is the row's token (width D), `w` its routing weight
(width 1), `p0`, `p1`, … the tensors of the row's expert. Its text is one line, with shared steps named:

    h=linear(x,p0); mul(linear(mul(silu(slice(h,0,1408,1)),slice(h,1408,2816,1)),p1),w)

The same steps, in a growing `Terms` table, are what lifting computes with: a term is an index into the table,
equal terms have equal indices, so no subtree is ever built (or multiplied) twice.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

Attr: TypeAlias = int | float | str | None


@dataclass(frozen=True)
class Operator:
    """One word of the vocabulary: how many rows it reads and the names of its attributes."""

    arity: int
    attrs: tuple[str, ...] = ()
    commutes: bool = False


# Every row is (rows, width). `linear` is x @ Pᵀ with P (out, in), `matmul` is x @ P with P (in, out); the
# others are torch's of these names, along the width where they have a dimension: `ir.reference` defines all.
OPERATORS: dict[str, Operator] = {
    "x": Operator(0),
    "w": Operator(0),
    "p": Operator(0, ("index",)),
    "const": Operator(0, ("value",)),
    # Leaves of a term still being built, named by the graph value they stand for; a finished Body has none of
    # them: a token, a number a pair, a tensor with the experts first, one expert's own, one that all share.
    "token": Operator(0, ("node",)),
    "pair": Operator(0, ("node",)),
    "expert": Operator(0, ("node",)),
    "own": Operator(0, ("node",)),
    "shared": Operator(0, ("node",)),
    "linear": Operator(2),
    "matmul": Operator(2),
    "add": Operator(2, commutes=True),
    "sub": Operator(2),
    "mul": Operator(2, commutes=True),
    "div": Operator(2),
    "minimum": Operator(2, commutes=True),
    "maximum": Operator(2, commutes=True),
    "concat": Operator(2),
    "power": Operator(2),
    "add_scaled": Operator(2, ("alpha",)),
    "lerp": Operator(3),
    "addcmul": Operator(3, ("value",)),
    "addcdiv": Operator(3, ("value",)),
    # Pointwise.
    "neg": Operator(1),
    "abs": Operator(1),
    "sign": Operator(1),
    "exp": Operator(1),
    "exp2": Operator(1),
    "expm1": Operator(1),
    "log": Operator(1),
    "log2": Operator(1),
    "log1p": Operator(1),
    "sqrt": Operator(1),
    "rsqrt": Operator(1),
    "reciprocal": Operator(1),
    "sin": Operator(1),
    "cos": Operator(1),
    "atan": Operator(1),
    "erf": Operator(1),
    "tanh": Operator(1),
    "sigmoid": Operator(1),
    "log_sigmoid": Operator(1),
    "relu": Operator(1),
    "silu": Operator(1),
    "mish": Operator(1),
    "selu": Operator(1),
    "hardswish": Operator(1),
    "hardsigmoid": Operator(1),
    "gelu": Operator(1),
    "gelu_tanh": Operator(1),
    "softplus": Operator(1, ("beta", "threshold")),
    "leaky_relu": Operator(1, ("negative_slope",)),
    "elu": Operator(1, ("alpha", "scale", "input_scale")),
    "celu": Operator(1, ("alpha",)),
    "threshold": Operator(1, ("threshold", "value")),
    "softshrink": Operator(1, ("lambd",)),
    "hardshrink": Operator(1, ("lambd",)),
    "nan_to_num": Operator(1, ("nan", "posinf", "neginf")),
    "pow": Operator(1, ("exponent",)),
    "clamp": Operator(1, ("min", "max")),
    "cast": Operator(1, ("dtype",)),
    # Truth values, and what chooses by them.
    "gt": Operator(2),
    "ge": Operator(2),
    "lt": Operator(2),
    "le": Operator(2),
    "eq": Operator(2, commutes=True),
    "ne": Operator(2, commutes=True),
    "logical_and": Operator(2, commutes=True),
    "logical_or": Operator(2, commutes=True),
    "logical_not": Operator(1),
    "where": Operator(3),
    # Along the width: to one number, or to a row of another width, or each number by all of them.
    "sum": Operator(1),
    "mean": Operator(1),
    "amax": Operator(1),
    "amin": Operator(1),
    "logsumexp": Operator(1),
    "norm": Operator(1, ("ord",)),
    "var": Operator(1, ("correction",)),
    "std": Operator(1, ("correction",)),
    "slice": Operator(1, ("start", "stop", "step")),
    "expand": Operator(1, ("width",)),
    "glu": Operator(1),
    "softmax": Operator(1),
    "log_softmax": Operator(1),
    # A weight of 1 and a bias of 0 are none.
    "layer_norm": Operator(3, ("eps",)),
    "group_norm": Operator(3, ("groups", "eps")),
    "rms_norm": Operator(2, ("eps",)),
}
LEAVES = frozenset({"token", "pair", "expert", "own", "shared"})
ACTIVATIONS = frozenset(
    {
        *("relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "softplus", "mish", "selu", "hardswish"),
        *("hardsigmoid", "leaky_relu", "elu", "celu"),
    }
)
GEMMS = frozenset({"linear", "matmul"})


@dataclass(frozen=True)
class Step:
    """One application: `op` is a key of OPERATORS, `args` earlier steps, `attrs` its attributes in order."""

    op: str
    args: tuple[int, ...] = ()
    attrs: tuple[Attr, ...] = ()

    def __post_init__(self) -> None:
        known = OPERATORS.get(self.op)
        if known is None:
            raise ValueError(f"unknown body operator {self.op!r}")
        if (len(self.args), len(self.attrs)) != (known.arity, len(known.attrs)):
            raise ValueError(f"{self.op} takes {known.arity} rows and attributes {known.attrs}, got {self}")


@dataclass(frozen=True)
class Body:
    """A finished term: steps in order, each used by a later one, the last one the result."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a body has at least one step")
        for i, step in enumerate(self.steps):
            if any(not 0 <= a < i for a in step.args):
                raise ValueError(f"step {i} ({step.op}) reads a step that does not come before it")

    @property
    def result(self) -> int:
        """The index of the last step, whose row is the body's value."""
        return len(self.steps) - 1

    @property
    def param_count(self) -> int:
        """How many parameter tensors the body reads: one more than the largest index."""
        return 1 + max((int(s.attrs[0] or 0) for s in self.steps if s.op == "p"), default=-1)

    def uses(self, op: str) -> bool:
        """Whether any step applies `op`."""
        return any(step.op == op for step in self.steps)

    def users(self) -> list[int]:
        """How many steps read each step; the result counts as read once."""
        count = [0] * len(self.steps)
        for step in self.steps:
            for a in step.args:
                count[a] += 1
        count[self.result] += 1
        return count

    def __str__(self) -> str:
        """The canonical line; `parse_body` reads it back."""
        users, text, lets, letters = self.users(), list[str](), list[str](), _letters()
        for i, step in enumerate(self.steps):
            spelled = _spell(step, text)
            if users[i] > 1 and step.args:
                name = next(letters)
                lets.append(f"{name}={spelled}")
                spelled = name
            text.append(spelled)
        return "; ".join([*lets, text[-1]])


@dataclass
class Terms:
    """A value-numbering table: equal steps get equal numbers, so a term *is* its number."""

    steps: list[Step] = field(default_factory=list)
    _numbers: dict[Step, int] = field(default_factory=dict)

    def number(self, op: str, args: tuple[int, ...] = (), attrs: tuple[Attr, ...] = ()) -> int:
        """The term `op(*args, *attrs)`; constants and the weight go second where the operator commutes."""
        if OPERATORS[op].commutes and self._rank(args[0]) > self._rank(args[1]):
            args = (args[1], args[0])
        step = Step(op, args, attrs)
        if step not in self._numbers:
            self._numbers[step] = len(self.steps)
            self.steps.append(step)
        return self._numbers[step]

    def _rank(self, term: int) -> int:
        """Of two operands that commute, rows come before weights and weights before constants."""
        return {"w": 1, "pair": 1, "const": 2}.get(self.steps[term].op, 0)

    def reachable(self, term: int) -> list[int]:
        """The terms that `term` is made of, operands before operators, left to right, itself last."""
        order: dict[int, None] = {}
        stack = [(term, False)]
        while stack:
            t, visited = stack.pop()
            if visited:
                order[t] = None
            elif t not in order:
                stack.append((t, True))
                stack.extend((a, False) for a in reversed(self.steps[t].args))
        return list(order)

    def leaves(self, term: int, op: str) -> list[Step]:
        """The distinct leaves of kind `op` ("x", "w", "p") under `term`, in order of appearance."""
        return [self.steps[t] for t in self.reachable(term) if self.steps[t].op == op]

    def body(self, term: int, rename: dict[Step, Step]) -> Body:
        """The finished term, its leaves replaced as `rename` says."""
        order = self.reachable(term)
        position = {t: i for i, t in enumerate(order)}
        return Body(
            tuple(
                rename.get(s, Step(s.op, tuple(position[a] for a in s.args), s.attrs))
                for s in (self.steps[t] for t in order)
            )
        )


def parse_body(text: str) -> Body:
    """The inverse of `str(body)`. Raises ValueError on anything else."""
    table, names = Terms(), dict[str, int]()
    result = -1
    try:
        statements = ast.parse(text.replace("; ", "\n")).body
    except SyntaxError as e:
        raise ValueError(f"not a body: {text!r}") from e
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = result = _read(value, table, names)
            case ast.Expr(value=value):
                result = _read(value, table, names)
            case _:
                raise ValueError(f"not a body: {text!r}")
    if result < 0:
        raise ValueError("an empty body")
    return table.body(result, {})


def _read(node: ast.expr, table: Terms, names: dict[str, int]) -> int:
    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=("x" | "w") as name):
            return table.number(name)
        case ast.Name(id=name) if name[0] == "p" and name[1:].isdigit():
            return table.number("p", (), (int(name[1:]),))
        case ast.Call(func=ast.Name(id=op), args=args) if op in OPERATORS:
            arity = OPERATORS[op].arity
            rows = tuple(_read(a, table, names) for a in args[:arity])
            return table.number(op, rows, tuple(_attr(a) for a in args[arity:]))
    value = _attr(node)
    if isinstance(value, (int, float)):
        return table.number("const", (), (value,))
    raise ValueError(f"not a body term: {ast.unparse(node)!r}")


def _attr(node: ast.expr) -> Attr:
    match node:
        case ast.Constant(value=int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            if isinstance(number := _attr(operand), (int, float)):
                return -number
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name(id=name):
            return name
    raise ValueError(f"not an attribute: {ast.unparse(node)!r}")


def _spell(step: Step, text: list[str]) -> str:
    match step.op:
        case "p":
            return f"p{step.attrs[0]}"
        case "const":
            return repr(step.attrs[0])
        case "x" | "w":
            return step.op
    attrs = [str(a) if isinstance(a, str) else repr(a) for a in step.attrs]
    return f"{step.op}({','.join([*(text[a] for a in step.args), *attrs])})"


def _letters() -> Iterator[str]:
    yield from "hgabcdefijklmnoqrstuvyz"
    yield from (f"v{i}" for i in range(10_000))
