"""Every pointwise operator, as it is generated for kernels, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.pointwise import POINTWISE, NoExpression, device_function
from dsmoe_compiler.codegen.term import Product, Term
from dsmoe_compiler.ir.body import OPERATORS, Attr, Body, parse_body
from tests.codegen.interpreted import interpreted, interpreter
from tests.codegen.operators import ATTRIBUTES, CASES, applied, assert_like, expected, operands_of


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


@pytest.mark.parametrize(("op", "attrs"), CASES, ids=str)
def test_an_operator_is_torchs(op: str, attrs: tuple[Attr, ...]) -> None:
    body, operands = applied(op, attrs), operands_of(OPERATORS[op].arity)
    # An operator is at most a dozen roundings, an exponential's and a logarithm's being two units each.
    rounding = 2.0**-11 if "float16" in attrs else 32 * 2.0**-24
    assert_like(_run(_term(body), operands), expected(body, operands), operands, rounding)


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
    body, operands = parse_body(text), operands_of(2)
    operands = [t[torch.isfinite(torch.stack(operands)).all(0)] for t in operands]
    assert_like(_run(_term(body), operands), expected(body, operands), operands, 2.0**-24)


def test_a_sum_of_truth_values_has_no_expression() -> None:
    with pytest.raises(NoExpression, match="truth values"):
        device_function("f", "It.", _term(parse_body("add(gt(p0,0.0),gt(p1,0.0))")), ["a", "b"], {})


def test_every_operator_with_attributes_is_tried_with_some() -> None:
    assert set(ATTRIBUTES) == {op for op in POINTWISE if OPERATORS[op].attrs}
