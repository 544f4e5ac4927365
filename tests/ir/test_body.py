"""A body is the same body after a round through its text, and computes what its operators say."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.ir.body import OPERATORS, Attr, Body, Step, Terms, parse_body
from dsmoe_compiler.ir.reference import evaluate

FINISHED = [name for name in OPERATORS if name not in ("token", "pair", "expert", "own")]
_NUMBERS = st.one_of(st.integers(-9, 9), st.floats(allow_nan=False, width=32))
_ATTRS: dict[str, st.SearchStrategy[Attr]] = {
    "index": st.integers(0, 3),
    "value": _NUMBERS,
    "exponent": _NUMBERS,
    "min": st.none() | _NUMBERS,
    "max": st.none() | _NUMBERS,
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "start": st.integers(0, 3),
    "stop": st.integers(4, 8),
    "step": st.integers(1, 2),
}


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """Any well-formed term: leaves first, then operators on what is there."""
    table = Terms()
    made = [table.number("x"), table.number("w"), table.number("p", (), (0,))]
    for _ in range(draw(st.integers(0, 12))):
        op = draw(st.sampled_from(FINISHED))
        args = tuple(draw(st.sampled_from(made)) for _ in range(OPERATORS[op].arity))
        made.append(table.number(op, args, tuple(draw(_ATTRS[a]) for a in OPERATORS[op].attrs)))
    return table.body(made[-1], {})


@given(bodies())
def test_text_round_trip(body: Body) -> None:
    again = parse_body(str(body))
    assert again == body
    assert str(again) == str(body) and "\n" not in str(body)


@given(bodies())
def test_every_step_is_read(body: Body) -> None:
    assert all(body.users())


def test_shared_steps_are_named_once() -> None:
    text = "h=linear(x,p0); mul(linear(mul(silu(slice(h,0,4,1)),slice(h,4,8,1)),p1),w)"
    assert str(parse_body(text)) == text
    assert sum(step.op == "linear" for step in parse_body(text).steps) == 2


def test_equal_terms_have_equal_numbers() -> None:
    table = Terms()
    x, w = table.number("x"), table.number("w")
    assert table.number("mul", (x, w)) == table.number("mul", (w, x)), "the weight goes second"
    assert table.number("sub", (x, w)) != table.number("sub", (w, x))


@pytest.mark.parametrize(
    "text",
    ["", "silu(x", "nothing(x)", "linear(x)", "silu(x,x)", "y", "x=1; for", "import os", "silu(**x)", "x.y"],
)
def test_what_is_no_body(text: str) -> None:
    with pytest.raises(ValueError, match="bod|step|operator|attribute|takes"):
        parse_body(text)


@pytest.mark.parametrize(
    "steps",
    [(), (Step("silu", (0,)),), (Step("x"), Step("silu", (2,)))],
    ids=["empty", "itself", "a later one"],
)
def test_what_is_no_straight_line(steps: tuple[Step, ...]) -> None:
    with pytest.raises(ValueError):
        Body(steps)


def test_evaluation_is_what_the_text_says() -> None:
    """float64, 6 products of unit size: 6·2⁻⁵³ each, 1e-14 leaves room."""
    x, w = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64)
    up, down = torch.randn(8, 6, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    body = parse_body(
        "h=linear(x,p0); mul(matmul(mul(gelu(slice(h,0,8,2)),clamp(slice(h,1,8,2),-0.5,None)),p1),w)"
    )
    h = x @ up.T
    expected = (F.gelu(h[:, ::2]) * h[:, 1::2].clamp(min=-0.5)) @ down * w
    torch.testing.assert_close(evaluate(body, x, w, [up, down]), expected, rtol=0, atol=1e-14)
