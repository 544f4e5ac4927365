"""Every pointwise operator of the native kernels against torch's in float64, at each level."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.codegen.native.instructions import lines
from dsmoe_compiler.codegen.native.sources import sources
from dsmoe_compiler.codegen.term import Term
from dsmoe_compiler.ir.body import OPERATORS, Attr, Body, Step, Terms, parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec
from dsmoe_compiler.runtime.native.experts import bind
from dsmoe_compiler.runtime.native.library import LEVELS
from tests.codegen.operators import CASES, applied, assert_like, expected, operands_of
from tests.runtime.native_levels import at

at_each_level = pytest.mark.parametrize("level", LEVELS)
# Beyond what is tried on a GPU: where exponentials leave float32, its smallest numbers, and integers that a
# float has no room for behind its point.
MORE = (
    88.72,
    88.73,
    -86.6,
    -86.7,
    -103.0,
    -104.0,
    1e-40,
    -1e-40,
    0.34,
    -0.35,
    0.62,
    0.63,
    8388609.0,
    -0.9999,
)


def by_kernels(body: Body, operands: list[Tensor], level: str, tokens: int, dtype: torch.dtype) -> Tensor:
    """The body's value for these numbers, of `tokens` rows alike; by tiles where a level has them, `dtype`
    is bfloat16 and the rows are many.

    They are vectors of the second of two experts, whose products are all 1: no number passes through a
    product, which would make +0 of −0.
    """
    count = len(operands[0])
    one = torch.ones(2, 1, 1, dtype=dtype)
    params = [one, one.expand(2, count, 1), *(torch.stack([t.flip(0), t]) for t in operands)]
    layer = bind(
        at(level),
        ExpertsSpec(2, 1, _where_one(body)),
        torch.ones(1, 1, dtype=dtype),
        torch.ones(1, 1),
        params,
    )
    ids = torch.ones(tokens, 1, dtype=torch.int64)
    rows = layer(torch.ones(tokens, 1, dtype=dtype), ids, torch.ones(tokens, 1))
    assert rows.dtype == torch.float32
    assert all(_same_bits(rows[0], row) for row in rows[1:])
    return rows[0]


def _where_one(body: Body) -> Body:
    """The body on p2, p3, … instead, chosen by the last product of an FFN being 1."""
    terms = Terms(list(parse_body("ne(linear(linear(x,p0),p1),0.0)").steps))
    chosen, at = len(terms.steps) - 1, list[int]()
    for step in body.steps:
        if step.op == "p":
            step = replace(step, attrs=(int(step.attrs[0] or 0) + 2,))
        at.append(terms.number(step.op, tuple(at[a] for a in step.args), step.attrs))
    value, otherwise = terms.number("cast", (at[-1],), ("float32",)), terms.number("const", (), (0.0,))
    return terms.body(terms.number("where", (chosen, value, otherwise)), {})


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Of numbers: what is no number has a sign that means nothing, and differs by how it came about."""
    return a.nan_to_num(math.pi).view(torch.int32).equal(b.nan_to_num(math.pi).view(torch.int32))


def _operands(op: str) -> list[Tensor]:
    arity = OPERATORS[op].arity
    few = operands_of(arity)
    if arity > 1:
        return few
    return [torch.cat([few[0], torch.tensor(MORE)])]


@at_each_level
@pytest.mark.parametrize(("op", "attrs"), CASES, ids=str)
def test_an_operator_is_torchs(op: str, attrs: tuple[Attr, ...], level: str) -> None:
    body, operands = applied(op, attrs), _operands(op)
    # An operator is at most a dozen roundings, an exponential's and a logarithm's being two units each.
    rounding = 2.0**-11 if "float16" in attrs else 32 * 2.0**-24
    for tokens, dtype in ((1, torch.float32), (40, torch.bfloat16)):
        got = by_kernels(body, operands, level, tokens, dtype)
        assert_like(got, expected(body, operands), operands, rounding)


@at_each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_rounds_to_the_last_bit(dtype: torch.dtype, level: str) -> None:
    """All kinds of numbers, ties to even among them; what is no number stays none, whichever it is."""
    bits = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64)
    ties = torch.arange(-200, 200) * 2**15 + torch.randint(0, 2**15, (400,)) * 2**16  # bfloat16's
    halves = (1 + torch.arange(2**11) / 2**11) * 2.0 ** torch.randint(-26, 17, (2**11,))  # float16's
    operands = torch.cat([torch.cat([bits, ties]).to(torch.int32).view(torch.float32), halves.float()])
    body = Body((Step("p", (), (0,)), Step("cast", (0,), (str(dtype).removeprefix("torch."),))))
    got, rounded = by_kernels(body, [operands], level, 1, torch.float32), operands.to(dtype).float()
    is_number = ~rounded.isnan()
    assert got.isnan().equal(~is_number)
    assert got[is_number].equal(rounded[is_number])


@at_each_level
@pytest.mark.parametrize(
    "text",
    [
        "mul(silu(p0),p1)",
        "mul(p0,silu(p1))",
        "mul(silu(p0),silu(p1))",
        "h=silu(p0); add(mul(h,p1),h)",
        "h=silu(p0); mul(h,h)",
        "reciprocal(neg(abs(p0)))",
        "mul(gt(p0,p1),p0)",
        "where(logical_and(gt(p0,0.0),lt(p1,0.0)),p0,p1)",
        "h=gt(p0,p1); where(h,sub(p0,p1),mul(h,p1))",
        "cast(cast(add(p0,p1),float64),float32)",
        "g=clamp(p0,None,7.0); mul(add(clamp(p1,-7.0,7.0),1.0),mul(g,sigmoid(mul(g,1.702))))",
    ],
)
def test_terms_of_several_operators(text: str, level: str) -> None:
    body, operands = parse_body(text), operands_of(2)
    operands = [t[torch.isfinite(torch.stack(operands)).all(0)].clamp(-1e9, 1e9) for t in operands]
    for tokens, dtype in ((1, torch.float32), (40, torch.bfloat16)):
        got = by_kernels(body, operands, level, tokens, dtype)
        assert_like(got, expected(body, operands), operands, 32 * 2.0**-24)


def _names() -> list[str]:
    return re.findall(r"^(?:VECTOR|SCALAR)\((\w+),", sources()["operators.def"].decode(), re.MULTILINE)


def _of(body: Body) -> set[int]:
    """The operators' numbers in a body's instructions."""
    term = Term()
    at = list[int]()
    for step in body.steps:
        op, attrs = ("product", step.attrs) if step.op == "p" else (step.op, step.attrs)
        at.append(term.number(op, tuple(at[a] for a in step.args), attrs))
    term.result = at[-1]
    return {line.op for line in lines(term)}


def test_every_operator_of_the_kernels_is_tried() -> None:
    tried = set[int]().union(*(_of(applied(op, attrs)) for op, attrs in CASES))
    tried |= _of(parse_body("mul(silu(p0),p1)")) | _of(parse_body("cast(p0,bfloat16)"))
    leaves = 4
    untried = {name for i, name in enumerate(_names()) if i + leaves not in tried}
    assert not untried, "no test reaches it"
    assert len(set(_names())) == len(_names()) and max(tried) == leaves + len(_names()) - 1
