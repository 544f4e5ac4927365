"""Every spelling becomes the op and computes what the model computes."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import event, given, note, reject, settings
from hypothesis import strategies as st

from tests.passes import spellings
from tests.passes.checks import assert_same, compiled, only_layer, some_inputs
from tests.passes.spellings import SPELLINGS, Sizes, Spec, Spelled, layer


def check(spec: Spec, dtype: torch.dtype = torch.float32, router: bool | None = None) -> None:
    made = layer(spec, dtype)
    program = compiled(made, width=spec.sizes.width)
    found = only_layer(program)
    assert found.fused and found.spec is not None, f"{spec}: {found.refusal}"
    assert (found.spec.router is not None) == (spec.route.fused if router is None else router), (
        program.report.remarks
    )
    assert (found.spec.shared is not None) == bool(spec.shared)
    assert found.spec.experts.count == spec.sizes.experts and found.spec.top_k == spec.sizes.top_k
    assert_same(program, made, some_inputs(spec.sizes.width, dtype))


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("body", [spellings.SWIGLU, spellings.BODIES[-1]], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_in_both_layouts(spelling: Spelled, body: spellings.Body, transposed: bool) -> None:
    check(Spec(spelling, body=body, transposed=transposed))


@pytest.mark.parametrize("body", spellings.BODIES, ids=str)
@pytest.mark.parametrize(
    "spelling",
    [spellings.grouped, spellings.gathered, spellings.dense_repeat],
    ids=["grouped", "gathered", "dense"],
)
def test_every_body(spelling: Spelled, body: spellings.Body) -> None:
    made = layer(Spec(spelling, body=body))
    program = compiled(made)
    spec = only_layer(program).spec
    assert spec is not None
    name = body.name.removesuffix(" + bias").removeprefix("separate ").removeprefix("[up;gate] ")
    kind = {"gpt-oss": "clamped SwiGLU", "ReLU FFN": "relu FFN"}.get(name, name)
    assert spec.experts.kind == kind
    layouts = {"separate SwiGLU": "separate", "[up;gate] SwiGLU": "[up;gate]", "gpt-oss": "interleaved"}
    assert spec.experts.layout == ("" if "ReLU" in body.name else layouts.get(body.name, "[gate;up]"))
    assert ("bias" in str(spec.experts)) == body.biased
    assert_same(program, made, some_inputs(16))


@pytest.mark.parametrize("route", [*spellings.ROUTERS, *spellings.IN_GROUPS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_router(route: spellings.Route, dtype: torch.dtype) -> None:
    check(Spec(route=route), dtype)


@pytest.mark.parametrize("shared", ["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shared_experts(shared: str, dtype: torch.dtype) -> None:
    made = layer(Spec(shared=shared), dtype)
    program = compiled(made)
    spec = only_layer(program).spec
    assert spec is not None and spec.shared is not None
    assert (spec.shared.width, spec.shared.gated) == (16, shared == "gated")
    assert_same(program, made, some_inputs(16, dtype))


def test_a_router_that_is_not_known_keeps_its_shared_experts_beside_it() -> None:
    made = layer(Spec(route=spellings.UNKNOWN[0], shared="plain"))
    program = compiled(made)
    spec = only_layer(program).spec
    assert spec is not None and spec.router is None and spec.shared is None
    assert_same(program, made, some_inputs(16))


def test_an_input_scaled_by_the_weight_is_a_spec_of_its_own() -> None:
    made = layer(Spec(spellings.dense_scaled_input))
    program = compiled(made)
    spec = only_layer(program).spec
    assert spec is not None and spec.experts.weighting == "inside"
    assert_same(program, made, some_inputs(16))


SIZES = [
    Sizes(experts=3, top_k=3),
    Sizes(experts=3, top_k=1),
    Sizes(width=13, hidden=7, experts=5, top_k=2),
    Sizes(width=8, hidden=8, experts=8, top_k=8),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "spelling",
    [spellings.grouped, spellings.gathered, spellings.dense_einsum],
    ids=["grouped", "gathered", "dense"],
)
def test_sizes_that_coincide_or_are_odd(spelling: Spelled, sizes: Sizes) -> None:
    check(Spec(spelling, sizes=sizes))


@pytest.mark.parametrize("example", [(1, 1), (1, 4), (2, 2)], ids=str)
def test_examples_whose_sizes_equal_k_or_one(example: tuple[int, int]) -> None:
    """Captured from T = 1 or T = K, right on all others."""
    made = layer(Spec(spellings.gathered))
    program = compiled(made, example)
    assert only_layer(program).fused
    assert_same(program, made, some_inputs(16))


def test_half_precision_grouped_products_are_torchs_own() -> None:
    made = layer(Spec(body=spellings.BIASED), torch.bfloat16)
    program = compiled(made)
    assert only_layer(program).idiom == "sorted, grouped GEMM"
    assert_same(program, made, some_inputs(16, torch.bfloat16))


def test_double_precision_agrees_to_its_last_digits() -> None:
    """64 products of unit size are off by 64·2⁻⁵³ at most, twice, summed over K: 1e-13 leaves room."""
    made = layer(Spec(spellings.gathered, body=spellings.BIASED, shared="gated"), torch.float64)
    program = compiled(made)
    assert only_layer(program).fused
    assert_same(program, made, some_inputs(16, torch.float64))


def test_the_validated_error_is_in_the_report() -> None:
    program = compiled(layer(Spec(shared="plain")))
    errors = {p.name: p.max_error for p in program.report.passes}
    for name in ("lift_experts", "fuse_router", "fuse_shared_experts"):
        error = errors[name]
        assert error is not None and math.isfinite(error) and error < 1e-4


# -- any layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A layer, its dtype, the shapes (B, S) it is captured and run on."""

    spec: Spec
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        shared = f", {self.spec.shared} shared expert" if self.spec.shared else ""
        return f"{self.spec}{shared}, {self.spec.sizes}, {self.dtype}, captured and run on {self.shapes}"


@st.composite
def sizes_of(draw: st.DrawFn) -> Sizes:
    """One expert, all of them, one a token, primes, sizes that coincide."""
    experts = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8]))
    top_k = draw(st.sampled_from(sorted({1, min(2, experts), max(experts - 1, 1), experts})))
    return Sizes(draw(st.sampled_from([2, 3, 8, 13])), draw(st.sampled_from([2, 5, 8])), experts, top_k)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    sizes = draw(sizes_of())
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    if dtype == torch.bfloat16:  # torch's own grouped product wants rows of whole 16 bytes
        sizes = replace(sizes, width=16, hidden=8)
    routes = [r for r in (*spellings.ROUTERS, *spellings.IN_GROUPS) if r.fits(sizes)]
    spec = Spec(
        draw(st.sampled_from((*SPELLINGS, spellings.dense_scaled_input))),
        draw(st.sampled_from(spellings.BODIES)),
        draw(st.sampled_from(routes)),
        draw(st.booleans()),
        sizes,
        draw(st.sampled_from(["", "plain", "gated"])),
    )
    captured = st.tuples(st.integers(1, 3), st.integers(1, 7))
    others = st.tuples(st.integers(0, 4), st.integers(1, 11))
    shapes = (draw(captured), (1, 1), *draw(st.lists(others, min_size=1, max_size=2)))
    return Example(spec, dtype, shapes)


def check_example(example: Example) -> None:
    """Every spelling is literally the formula, so it fuses, but one; nothing checks the rewrite."""
    note(str(example))
    spec, (captured, *_) = example.spec, example.shapes
    made = layer(spec, example.dtype)
    inputs = some_inputs(spec.sizes.width, example.dtype, example.shapes)
    try:
        made(inputs[0])
    except RuntimeError:
        reject()  # rows that weights of a wider type have scaled do not fit the experts: no such layer runs
    program = compiled(made, captured, spec.sizes.width, verify="off")
    found = only_layer(program)
    if spec.spelling is spellings.dense_scaled_input and (spec.body.biased or spec.body.name == "gpt-oss"):
        assert found.refusal is not None and found.refusal.code == "R406", "f(0) is not 0"
    else:
        assert found.fused, str(found.refusal)
    event(spec.spelling.__name__)
    assert_same(program, made, inputs)


@given(examples())
@settings(max_examples=30)
def test_some_layers_fuse_and_equal_eager(example: Example) -> None:
    check_example(example)


@pytest.mark.slow
@given(examples())
@settings(max_examples=400)
def test_any_layer_fuses_and_equals_eager(example: Example) -> None:
    check_example(example)
