"""Pointwise operators of bodies: attributes and numbers to try them on, and torch's answers in float64."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

from dsmoe_compiler.codegen.pointwise import POINTWISE
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import OPERATORS, Attr, Body, Step

INF = math.inf
# What operators treat apart: zeros, the ends of activations' pieces, sizes at which exponentials and cubes
# overflow float32, and what is no number.
SPECIAL = (
    *(0.0, -0.0, 1e-30, -1e-30, 1e-6, -1e-6, 1e-3, -1e-3, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0),
    *(3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 25.0, 87.0, -87.0, 100.0, -100.0, 1e15, -1e15, 3e38, -3e38),
    *(INF, -INF, math.nan),
)
# Attributes to try, of operators that have some.
ATTRIBUTES: dict[str, list[tuple[Attr, ...]]] = {
    "add_scaled": [(2.0,), (-0.5,), (1,)],
    "addcmul": [(1.0,), (-0.5,)],
    "addcdiv": [(1.0,), (-0.5,)],
    "softplus": [(1.0, 20.0), (2.0, 5.0), (1, 20)],
    "leaky_relu": [(0.01,), (-0.5,)],
    "elu": [(1.0, 1.0, 1.0), (0.5, 2.0, 1.5)],
    "celu": [(1.0,), (0.5,)],
    "threshold": [(0.5, -1.0), (-1, 20)],
    "softshrink": [(0.5,), (0.0,)],
    "hardshrink": [(0.5,), (0.0,)],
    "pow": [(1.0,), (2,), (2.0,), (3,), (4.0,), (0.5,), (-0.5,), (-1.0,)],
    "clamp": [(-1.0, 2.0), (None, 1.0), (0, None), (2.0, -1.0)],
    "cast": [("float32",), ("float16",), ("float64",)],
}
CASES = [(op, attrs) for op in POINTWISE for attrs in ATTRIBUTES.get(op, [()])]


@cache
def operands_of(count: int) -> list[Tensor]:
    """`count` rows of numbers, exact in float32: all choices of special ones, then random ones."""
    chosen = torch.tensor(list(itertools.product(_fewer(count), repeat=count)), dtype=torch.float32).T
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(count, 2000, generator=generator).mul(4).exp()
    random = torch.randn(count, 2000, generator=generator) * size
    return list(torch.cat([chosen, random.clamp(-1e4, 1e4)], dim=1))


def _fewer(count: int) -> tuple[float, ...]:
    # Products of more than one number so large pass the range of float32, not of float64.
    few = (0.0, -0.0, 0.5, 1.0, -1.0, -2.0, 3.0, 1e9, INF, -INF, math.nan)
    return {1: SPECIAL, 2: tuple(n for n in SPECIAL if abs(n) != 3e38)}.get(count, few)


def applied(op: str, attrs: tuple[Attr, ...]) -> Body:
    """The operator on p0, p1, …"""
    arity = OPERATORS[op].arity
    steps = [Step("p", (), (i,)) for i in range(arity)]
    first = 0
    if op == "where":  # its first operand is a truth value
        steps += [Step("const", (), (0.5,)), Step("gt", (0, arity))]
        first = arity + 1
    return Body((*steps, Step(op, (first, *range(1, arity)), attrs)))


def expected(body: Body, operands: list[Tensor]) -> Tensor:
    """torch's value in float64."""
    wide = [t.double() for t in operands]
    return reference.evaluate(body, wide[0], None, wide).double()


def assert_like(got: Tensor, exact: Tensor, operands: list[Tensor], rounding: float) -> None:
    """Equal up to rounding: of the result, of what it is the difference of, of float32's smallest numbers.

    What overflows float32 is its infinity; a result beside an overflow inside may be either.
    """
    top = torch.finfo(torch.float32).max
    size = torch.stack([t.double().abs().nan_to_num(0.0) for t in operands]).amax(0)
    wrong = torch.isnan(got) != torch.isnan(exact)
    limited = exact.clamp(-top, top)
    allowed = rounding * (limited.abs() + size.clamp(max=1e4)) + 2.0**-148
    close = (got.double().clamp(-top, top) - limited).abs() <= allowed
    wrong |= ~torch.isnan(exact) & ~close
    at = torch.nonzero(wrong).flatten()[:8]
    told = [(*(t[i].item() for t in operands), got[i].item(), exact[i].item()) for i in at]
    assert not told, f"operands, result, expected: {told}"
