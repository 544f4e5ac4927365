"""Every pointwise operator, as it is generated for kernels, against torch's in float64."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
import triton
from torch import Tensor

from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.pointwise import POINTWISE, NoExpression, device_function
from dsmoe_compiler.codegen.term import Product, Term
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.body import OPERATORS, Attr, Body, Step, parse_body
from tests.codegen.interpreted import interpreted, interpreter

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
def _operands(count: int) -> list[Tensor]:
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


def _body(op: str, attrs: tuple[Attr, ...]) -> Body:
    """The operator on p0, p1, …"""
    arity = OPERATORS[op].arity
    steps = [Step("p", (), (i,)) for i in range(arity)]
    first = 0
    if op == "where":  # its first operand is a truth value
        steps += [Step("const", (), (0.5,)), Step("gt", (0, arity))]
        first = arity + 1
    return Body((*steps, Step(op, (first, *range(1, arity)), attrs)))


def _term(body: Body) -> Term:
    """The body's steps as a term, its tensors as products."""
    term, lines = Term(), list[int]()
    for step in body.steps:
        args = tuple(lines[a] for a in step.args)
        lines.append(term.number("product" if step.op == "p" else step.op, args, step.attrs))
    term.products = [Product(i, False) for i in range(body.param_count)]
    term.result = lines[-1]
    return term


def _run(term: Term, operands: list[Tensor]) -> Tensor:
    """The term's device function on these numbers, in the interpreter."""
    names = ["a", "b", "c"][: len(operands)]
    made = device_function("f", "It.", term, names, {})
    loads = "".join(f"    {n} = tl.load({n} + at, mask=at < N, other=0.0)\n" for n in names)
    kernel = (
        f"@triton.jit\ndef kernel({', '.join(names)}, out, N, BLOCK: tl.constexpr):\n"
        f"    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n{loads}"
        f"    result = f({', '.join(names)})\n"
        "    tl.store(out + at, result.to(tl.float32), mask=at < N)\n"
    )
    out = torch.empty_like(operands[0])
    with interpreter():
        library = interpreted("functions")
        module = load(f"import triton\nimport triton.language as tl\n{made.source}\n{kernel}")
        vars(module).update({name: getattr(library, name) for name in made.calls})
        grid = (triton.cdiv(out.numel(), 4096),)
        module.kernel[grid](*[t.contiguous() for t in operands], out, out.numel(), BLOCK=4096)
    return out


def _expected(body: Body, operands: list[Tensor]) -> Tensor:
    """torch's value in float64."""
    wide = [t.double() for t in operands]
    return reference.evaluate(body, wide[0], None, wide).double()


def _assert_like(got: Tensor, expected: Tensor, operands: list[Tensor], rounding: float) -> None:
    """Equal up to rounding: of the result, and of what it is the difference of.

    What overflows float32 is its infinity; a result beside an overflow inside may be either.
    """
    top = torch.finfo(torch.float32).max
    size = torch.stack([t.double().abs().nan_to_num(0.0) for t in operands]).amax(0)
    wrong = torch.isnan(got) != torch.isnan(expected)
    limited = expected.clamp(-top, top)
    close = (got.double().clamp(-top, top) - limited).abs() <= rounding * (
        limited.abs() + size.clamp(max=1e4)
    )
    wrong |= ~torch.isnan(expected) & ~close
    at = torch.nonzero(wrong).flatten()[:8]
    told = [(*(t[i].item() for t in operands), got[i].item(), expected[i].item()) for i in at]
    assert not told, f"operands, result, expected: {told}"


@pytest.mark.parametrize(("op", "attrs"), CASES, ids=str)
def test_an_operator_is_torchs(op: str, attrs: tuple[Attr, ...]) -> None:
    body, operands = _body(op, attrs), _operands(OPERATORS[op].arity)
    # An operator is at most a dozen roundings, an exponential's and a logarithm's being two units each.
    rounding = 2.0**-11 if "float16" in attrs else 32 * 2.0**-24
    _assert_like(_run(_term(body), operands), _expected(body, operands), operands, rounding)


@pytest.mark.parametrize(
    "text",
    [
        "mul(gt(p0,p1),p0)",
        "add(cast(gt(p0,0.0),float32),cast(gt(p1,0.0),float32))",
        "sub(cast(gt(p0,0.0),float32),cast(lt(p0,0.0),float32))",
        "neg(cast(ge(p0,p1),float32))",
        "add(ne(p0,p1),1.0)",
        "eq(gt(p0,0.0),1.0)",
        "mul(logical_not(p0),p1)",
        "logical_or(cast(gt(p0,p1),float32),p1)",
        "where(logical_and(gt(p0,0.0),lt(p1,0.0)),p0,p1)",
        "where(gt(p0,p1),cast(gt(p0,0.0),float32),p1)",
        "where(gt(p0,p1),1.0,0.0)",
        "where(where(gt(p0,0.0),gt(p1,0.0),lt(p1,0.0)),p0,p1)",
        "h=gt(p0,p1); where(h,sub(p0,p1),mul(h,p1))",
    ],
)
def test_truth_values_are_numbers_where_numbers_are_read(text: str) -> None:
    body, operands = parse_body(text), _operands(2)
    operands = [t[torch.isfinite(torch.stack(operands)).all(0)] for t in operands]
    _assert_like(_run(_term(body), operands), _expected(body, operands), operands, 2.0**-24)


def test_a_sum_of_truth_values_has_no_expression() -> None:
    with pytest.raises(NoExpression, match="truth values"):
        device_function("f", "It.", _term(parse_body("add(gt(p0,0.0),gt(p1,0.0))")), ["a", "b"], {})


def test_every_operator_with_attributes_is_tried_with_some() -> None:
    assert set(ATTRIBUTES) == {op for op in POINTWISE if OPERATORS[op].attrs}
