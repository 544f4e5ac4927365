"""A body is the same body after a round through its text, and computes what its operators say."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.ir.body import LEAVES, OPERATORS, Attr, Body, Step, Terms, parse_body
from dsmoe_compiler.ir.reference import evaluate

FINISHED = [name for name in OPERATORS if name not in LEAVES]
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
    **dict.fromkeys(("negative_slope", "alpha", "scale", "input_scale", "threshold", "lambd"), _NUMBERS),
    **dict.fromkeys(("ord", "correction", "eps", "beta", "nan", "posinf", "neginf"), _NUMBERS),
    "groups": st.integers(1, 3),
    "width": st.integers(1, 9),
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


aten = torch.ops.aten
# What torch calls each operator, on rows a (4, 6), b of the same shape, a vector v (6,), in its own schema.
ON_A: dict[str, Callable[..., torch.Tensor]] = {
    "neg(x)": aten.neg.default,
    "abs(x)": aten.abs.default,
    "sign(x)": aten.sign.default,
    "exp(x)": aten.exp.default,
    "exp2(x)": aten.exp2.default,
    "expm1(x)": aten.expm1.default,
    "log(abs(x))": lambda a: aten.log.default(a.abs()),
    "log2(abs(x))": lambda a: aten.log2.default(a.abs()),
    "log1p(abs(x))": lambda a: aten.log1p.default(a.abs()),
    "sqrt(abs(x))": lambda a: aten.sqrt.default(a.abs()),
    "rsqrt(abs(x))": lambda a: aten.rsqrt.default(a.abs()),
    "reciprocal(x)": aten.reciprocal.default,
    "sin(x)": aten.sin.default,
    "cos(x)": aten.cos.default,
    "erf(x)": aten.erf.default,
    "tanh(x)": aten.tanh.default,
    "sigmoid(x)": aten.sigmoid.default,
    "log_sigmoid(x)": aten.log_sigmoid.default,
    "relu(x)": aten.relu.default,
    "silu(x)": aten.silu.default,
    "mish(x)": aten.mish.default,
    "selu(x)": aten.selu.default,
    "hardswish(x)": aten.hardswish.default,
    "hardsigmoid(x)": aten.hardsigmoid.default,
    "gelu(x)": aten.gelu.default,
    "gelu_tanh(x)": lambda a: aten.gelu.default(a, approximate="tanh"),
    "softplus(x,1,20)": aten.softplus.default,
    "softplus(x,2.0,1.5)": lambda a: aten.softplus.default(a, 2.0, 1.5),
    "nan_to_num(log(x),0.5,None,-3)": lambda a: aten.nan_to_num.default(aten.log.default(a), 0.5, None, -3),
    "power(2,x)": lambda a: aten.pow.Scalar(2, a),
    "atan(x)": aten.atan.default,
    "group_norm(x,1,0,3,0.001)": lambda a: aten.group_norm.default(a, 3, None, None, 0.001),
    "lerp(x,relu(x),0.25)": lambda a: aten.lerp.Scalar(a, a.relu(), 0.25),
    "leaky_relu(x,0.2)": lambda a: aten.leaky_relu.default(a, 0.2),
    "elu(x,1.5,0.5,2.0)": lambda a: aten.elu.default(a, 1.5, 0.5, 2.0),
    "celu(x,1.5)": lambda a: aten.celu.default(a, 1.5),
    "threshold(x,0.5,-3)": lambda a: aten.threshold.default(a, 0.5, -3),
    "softshrink(x,0.5)": lambda a: aten.softshrink.default(a, 0.5),
    "hardshrink(x,0.5)": lambda a: aten.hardshrink.default(a, 0.5),
    "clamp(x,0,6)": aten.relu6.default,
    "clamp(x,-0.5,0.25)": lambda a: aten.hardtanh.default(a, -0.5, 0.25),
    "pow(x,3)": lambda a: aten.pow.Tensor_Scalar(a, 3),
    "sum(x)": lambda a: aten.sum.dim_IntList(a, [-1], True),
    "mean(x)": lambda a: aten.mean.dim(a, [-1], True),
    "amax(x)": lambda a: aten.max.dim(a, -1, True)[0],
    "amin(x)": lambda a: aten.min.dim(a, -1, True)[0],
    "logsumexp(x)": lambda a: aten.logsumexp.default(a, [-1], True),
    "norm(x,2)": lambda a: aten.norm.ScalarOpt_dim(a, 2, [-1], True),
    "norm(x,1.5)": lambda a: aten.linalg_vector_norm.default(a, 1.5, [-1], True),
    "var(x,0)": lambda a: aten.var.dim(a, [-1], False, True),
    "std(x,1)": lambda a: aten.std.correction(a, [-1], correction=1, keepdim=True),
    "slice(x,1,5,2)": lambda a: aten.slice.Tensor(a, 1, 1, 5, 2),
    "expand(mean(x),3)": lambda a: aten.expand.default(aten.mean.dim(a, [-1], True), [-1, 3]),
    "glu(x)": lambda a: aten.glu.default(a, -1),
    "softmax(x)": lambda a: aten.softmax.int(a, -1),
    "log_softmax(x)": lambda a: aten.log_softmax.int(a, -1),
    "layer_norm(x,1,0,0.001)": lambda a: aten.layer_norm.default(a, [6], None, None, 0.001),
    "rms_norm(x,1,0.001)": lambda a: aten.rms_norm.default(a, [6], None, 0.001),
    "rms_norm(x,1,None)": lambda a: aten.rms_norm.default(a, [6]),
    "where(gt(x,0.5),x,1)": lambda a: aten.where.ScalarOther(aten.gt.Scalar(a, 0.5), a, 1),
    "where(logical_not(ge(x,0)),-2.0,x)": lambda a: aten.masked_fill.Scalar(a, aten.lt.Scalar(a, 0), -2.0),
}
WITH_A_VECTOR: dict[str, Callable[..., torch.Tensor]] = {
    "add(x,p0)": aten.add.Tensor,
    "sub(p0,x)": lambda a, v: aten.sub.Tensor(v, a),
    "div(x,p0)": aten.div.Tensor,
    "minimum(x,p0)": aten.minimum.default,
    "maximum(x,p0)": aten.maximum.default,
    "concat(x,mul(x,p0))": lambda a, v: aten.cat.default([a, a * v], -1),
    "where(logical_and(lt(x,p0),ne(x,0)),x,p0)": lambda a, v: aten.where.self((a < v) & (a != 0), a, v),
    "where(logical_or(le(x,p0),eq(x,1)),x,p0)": lambda a, v: aten.where.self((a <= v) | (a == 1), a, v),
    "add_scaled(x,p0,0.3)": lambda a, v: aten.add.Tensor(a, v, alpha=0.3),
    "addcmul(x,x,p0,0.5)": lambda a, v: aten.addcmul.default(a, a, v, value=0.5),
    "addcdiv(x,p0,add(abs(x),1),0.5)": lambda a, v: aten.addcdiv.default(a, v, a.abs() + 1, value=0.5),
    "group_norm(x,p0,p0,2,1e-05)": lambda a, v: aten.group_norm.default(a, 2, v, v),
    "layer_norm(x,p0,0,1e-05)": lambda a, v: aten.layer_norm.default(a, [6], v),
    "layer_norm(x,p0,p0,1e-05)": lambda a, v: aten.layer_norm.default(a, [6], v, v),
    "rms_norm(x,p0,1e-06)": lambda a, v: aten.rms_norm.default(a, [6], v, 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", [*ON_A, *WITH_A_VECTOR])
def test_operators_are_torchs_own(text: str, dtype: torch.dtype) -> None:
    """fp32: two orders of a sum of 6 differ by 4 roundings at most, 1e-6; bfloat16: the last place, 2⁻⁷."""
    torch.manual_seed(0)
    a, v = (2 * torch.randn(4, 6)).to(dtype), torch.randn(6).to(dtype)
    own, expected = ([], ON_A[text](a)) if text in ON_A else ([v], WITH_A_VECTOR[text](a, v))
    found = evaluate(parse_body(text), a, None, own)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 4)


def test_every_operator_is_held_against_torch() -> None:
    held = " ".join([*ON_A, *WITH_A_VECTOR])
    structural = {"x", "w", "p", "const", "linear", "matmul", "cast"}
    assert [op for op in FINISHED if f"{op}(" not in held and op not in structural] == []


@pytest.mark.parametrize("text", [t for t in WITH_A_VECTOR if "norm" in t])
def test_a_norm_takes_a_weight_a_row(text: str) -> None:
    """Rows of several experts at once carry each its expert's vector."""
    a, v = torch.randn(4, 6), torch.randn(4, 6)
    body = parse_body(text)
    one_by_one = torch.cat([evaluate(body, a[i : i + 1], None, [v[i]]) for i in range(4)])
    torch.testing.assert_close(evaluate(body, a, None, [v]), one_by_one)
