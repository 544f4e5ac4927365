"""Bodies as the kernels run them."""

from __future__ import annotations

import pytest

from dsmoe_compiler.codegen.ffn import Ffn, Unsupported, as_ffn
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.codegen.pointwise import NoExpression, device_function
from dsmoe_compiler.codegen.term import Product, Term, Vector
from dsmoe_compiler.ir.body import parse_body

D, F = 16, 12
UP, DOWN, BIAS, OUT_BIAS = (4, 2 * F, D), (4, D, F), (4, 2 * F), (4, D)


def ffn(text: str, *shapes: tuple[int, ...]) -> Ffn:
    """A body whose tensors are contiguous and of these sizes."""
    return as_ffn(parse_body(text), D, [_contiguous(s) for s in shapes])


def _contiguous(shape: tuple[int, ...]) -> Operand:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return Operand(shape, tuple(strides), "float32")


def lines(term: Term, products: list[str]) -> list[str]:
    """The generated function's statements."""
    strides = {v.param: 100 for v in term.vectors}
    return [
        line.strip() for line in device_function("f", "", term, products, strides).source.splitlines()[3:]
    ]


def test_swiglu() -> None:
    found = ffn(
        f"h=linear(x,p0); mul(linear(mul(silu(slice(h,0,{F},1)),slice(h,{F},{2 * F},1)),p1),w)", UP, DOWN
    )
    assert found.products == [Product(0, False, 0), Product(0, False, F)]
    assert (found.width, found.down, found.is_weighted, found.factor) == (F, Product(1, False), True, None)
    assert lines(found.middle, ["gate", "up"]) == ["return silu(gate) * up"]
    assert lines(found.last, ["down"]) == ["return down * weight"]


def test_the_activated_product_is_the_gate() -> None:
    found = ffn(f"h=linear(x,p0); linear(mul(slice(h,0,{F},1),silu(slice(h,{F},{2 * F},1))),p1)", UP, DOWN)
    assert [p.first for p in found.products] == [F, 0]
    assert lines(found.middle, ["gate", "up"]) == ["return up * silu(gate)"]


def test_a_bias_before_the_slices_is_read_in_parts() -> None:
    text = f"h=add(linear(x,p0),p1); add(linear(mul(relu(slice(h,1,{2 * F},2)),slice(h,0,{2 * F},2)),p2),p3)"
    found = ffn(text, UP, BIAS, DOWN, OUT_BIAS)
    assert [(p.first, p.step) for p in found.products] == [(1, 2), (0, 2)]
    assert found.middle.vectors == [Vector(1, 1, 2), Vector(1, 0, 2)]
    assert "expert.to(tl.int64) * 100 + 1 + 2 * column" in lines(found.middle, ["gate", "up"])[0]
    assert found.last.vectors == [Vector(3)] and not found.is_weighted


def test_a_vector_that_all_experts_share_is_read_without_the_expert() -> None:
    found = ffn("linear(mul(relu(linear(x,p0)),p1),p2)", (4, F, D), (4, F), DOWN)
    made = device_function("f", "", found.middle, ["up"], {1: 0})
    assert "def f(up, column, inside, p1):" in made.source and "expert" not in made.source


def test_one_number_an_expert() -> None:
    found = ffn("mul(linear(relu(linear(x,p0)),p1),p2)", (4, F, D), DOWN, (4, 1))
    assert found.last.vectors == [Vector(2, single=True)]
    assert lines(found.last, ["down"])[0] == "b0 = tl.load(p2 + expert.to(tl.int64) * 100).to(tl.float32)"


def test_glu() -> None:
    found = ffn("linear(glu(linear(x,p0)),p1)", UP, DOWN)
    assert found.width == F and [p.first for p in found.products] == [F, 0]
    assert lines(found.middle, ["gate", "up"]) == ["return up * tl.sigmoid(gate)"]


def test_what_two_read_is_computed_once() -> None:
    found = ffn("g=add(linear(x,p0),1.0); linear(mul(g,sigmoid(g)),p1)", (4, F, D), DOWN)
    assert lines(found.middle, ["up"]) == ["v0 = up + 1.0", "return v0 * tl.sigmoid(v0)"]


def test_a_term_of_the_weight_before_the_products() -> None:
    found = ffn("linear(relu(linear(mul(x,sigmoid(w)),p0)),p1)", (4, F, D), DOWN)
    assert found.factor is not None
    assert lines(found.factor, []) == ["return tl.sigmoid(weight)"]


REFUSED = {
    "no product": ("mul(w,2.0)", "it has no product"),
    "one product": ("mul(linear(x,p0),w)", "it has one product only"),
    "a constant hidden row": ("linear(mul(p2,w),p1)", "its hidden row is no product"),
    "two last products": ("add(linear(x,p0),linear(x,p1))", "no single last product"),
    "a norm between": ("linear(softmax(linear(x,p0)),p1)", "`softmax` joins the numbers of a row"),
    "a residual": ("add(linear(relu(linear(x,p0)),p1),x)", "it reads x beside its products"),
    "a norm before": ("linear(relu(linear(softmax(x),p0)),p1)", "something computed from x"),
    "scaled by its parameter": ("linear(relu(linear(mul(x,p2),p0)),p1)", "something computed from x"),
    "a computed matrix": ("linear(relu(linear(x,mul(p0,2.0))),p1)", "matrix is computed"),
    "every third": (f"h=linear(x,p0); linear(relu(slice(h,0,{F},3)),p1)", "every 3th output"),
    "half a pair": (f"h=linear(x,p0); linear(relu(slice(h,0,{F},2)),p1)", "every other output"),
    "a gate of one number": (
        f"h=linear(x,p0); linear(mul(silu(slice(h,0,1,1)),slice(h,1,{F + 1},1)),p1)",
        "one number of a product",
    ),
    "an output of one number": ("add(linear(relu(linear(x,p0)),p3),p2)", "one number of a product"),
    "a part of the output": ("slice(linear(relu(linear(x,p0)),p1),0,8,1)", "last product is read in part"),
    "three products": (
        f"h=linear(x,p0); linear(mul(mul(slice(h,0,8,1),slice(h,8,16,1)),slice(h,16,{2 * F},1)),p1)",
        "more than a gate and an up",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_bodies_are_refused_with_the_reason(what: str) -> None:
    text, because = REFUSED[what]
    with pytest.raises(Unsupported, match=because):
        ffn(text, UP if "h=" in text else (4, F, D), DOWN, (4, D), (4, 1, F))


def test_parts_of_a_row() -> None:
    """From its end, and one number of a vector."""
    found = ffn(f"h=linear(x,p0); linear(mul(silu(slice(h,-{F},None,1)),slice(p2,3,4,1)),p1)", UP, DOWN, BIAS)
    assert [p.first for p in found.products] == [F]
    assert found.middle.vectors == [Vector(2, 3, single=True)]
    assert "p2 + expert.to(tl.int64) * 100 + 3)" in lines(found.middle, ["up"])[0]


@pytest.mark.parametrize("operator", ["atan({})", "pow({},2.5)", "cast({},int64)"])
def test_an_operator_without_an_expression(operator: str) -> None:
    text = "linear(" + operator.format("linear(x,p0)") + ",p1)"
    with pytest.raises((Unsupported, NoExpression)):
        device_function("f", "", ffn(text, (4, F, D), DOWN).middle, ["up"], {})
