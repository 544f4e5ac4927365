"""Every spelling becomes the op and computes what the model computes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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


@given(
    spelling=st.sampled_from(SPELLINGS),
    body=st.sampled_from(spellings.BODIES),
    route=st.sampled_from(spellings.ROUTERS),
    transposed=st.booleans(),
    shared=st.sampled_from(["", "plain", "gated"]),
    sizes=st.builds(
        Sizes,
        width=st.sampled_from([3, 8, 13]),
        hidden=st.sampled_from([1, 5, 8]),
        experts=st.sampled_from([2, 3, 8]),
        top_k=st.integers(1, 2),
    ),
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7)), min_size=2, max_size=2),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_compiled_equals_eager(
    spelling: Spelled,
    body: spellings.Body,
    route: spellings.Route,
    transposed: bool,
    shared: str,
    sizes: Sizes,
    shapes: list[tuple[int, int]],
) -> None:
    """Fused or refused, with nothing checking it."""
    spec = replace(Spec(spelling, body=body, route=route), transposed=transposed, shared=shared, sizes=sizes)
    made = layer(spec)
    program = compiled(made, width=sizes.width, verify="off")
    assert_same(program, made, some_inputs(sizes.width, shapes=shapes))
