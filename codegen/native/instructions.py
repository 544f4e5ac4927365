"""A pointwise term as the lines that the CPU kernels run: operators by their number in `operators.def`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.codegen.term import Step, Term
from dsmoe_compiler.ir.body import Attr

# Leaves come before the operators, in the order that elementary.h gives them.
_LEAVES = {"product": 0, "vector": 1, "const": 2, "w": 3}
_EXACT = ("float32", "float64")  # casts to them round nothing: the kernels compute in float32
# Powers that torch has operators for: C's `pow` has other answers at −0 and −∞.
_ROOTS: dict[Attr, str] = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


@dataclass(frozen=True)
class Line:
    """One line: an operator's number, the lines it reads (of a leaf: which one), its constants."""

    op: int
    args: tuple[int, ...] = ()
    constants: tuple[float, ...] = ()


def lines(term: Term) -> tuple[Line, ...]:
    """The term's lines, its value last. Raises Unsupported for an operator that the kernels do not have."""
    made, at = list[Line](), dict[int, int]()
    steps = _gated(term.steps)
    for i in _needed(steps, term.result):
        step = steps[i]
        args = tuple(at[a] for a in step.args)
        if step.op == "cast" and step.attrs[0] in _EXACT:
            at[i] = args[0]
            continue
        made.append(_line(step, args))
        at[i] = len(made) - 1
    return tuple(made)


def _gated(steps: Sequence[Step]) -> list[Step]:
    """The same steps, silu(a) · b as one: what most bodies are is read and written once less."""
    fused = list(steps)
    for i, step in enumerate(steps):
        for gate, other in (step.args, step.args[::-1]) if step.op == "mul" else ():
            if steps[gate].op == "silu":
                fused[i] = Step("silu_mul", (steps[gate].args[0], other))
    return fused


def _needed(steps: Sequence[Step], result: int) -> list[int]:
    """The steps that the result is made of, in their order."""
    needed, stack = {result}, [result]
    while stack:
        for a in steps[stack.pop()].args:
            if a not in needed:
                needed.add(a)
                stack.append(a)
    return sorted(needed)


def _line(step: Step, args: tuple[int, ...]) -> Line:
    numbers = _numbers()
    match step.op:
        case "product" | "vector":
            return Line(_LEAVES[step.op], (int(step.attrs[0] or 0),))
        case "w":
            return Line(_LEAVES["w"])
        case "const":
            return Line(_LEAVES["const"], (), (_number(step.attrs[0]),))
        case "clamp":
            low, high = step.attrs
            bounds = (-math.inf if low is None else _number(low), math.inf if high is None else _number(high))
            return Line(numbers["clamp"], args, bounds)
        case "pow" if step.attrs[0] == 2:
            return Line(numbers["mul"], args * 2)
        case "pow" if step.attrs[0] in _ROOTS:
            return Line(numbers[_ROOTS[step.attrs[0]]], args)
        case "cast":
            rounding = numbers.get(f"round_{step.attrs[0]}")
            if rounding is None:
                raise Unsupported(f"a cast to {step.attrs[0]}")
            return Line(rounding, args)
    if step.op not in numbers:
        raise Unsupported(f"the kernels have no `{step.op}`")
    return Line(numbers[step.op], args, tuple(map(_number, step.attrs)))


def _number(value: Attr) -> float:
    assert isinstance(value, (int, float))
    return float(value)


@cache
def _numbers() -> dict[str, int]:
    """Each operator's number: its place in the table, after the leaves."""
    table = files("dsmoe_compiler.codegen.native").joinpath("operators.def").read_text(encoding="utf-8")
    names = re.findall(r"^(?:VECTOR|SCALAR)\((\w+),", table, re.MULTILINE)
    return {name: len(_LEAVES) + i for i, name in enumerate(names)}
