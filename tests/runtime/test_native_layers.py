"""The native kernels against float64 at each level: every body, layout, dtype, load, router and size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text
from dsmoe_compiler.runtime.cpu import CpuExperts
from dsmoe_compiler.runtime.native.levels import VARIABLE
from dsmoe_compiler.runtime.native.library import LEVELS
from tests.codegen.layers import LAYOUTS, MIDDLES, ROUTERS, Made, make
from tests.codegen.pairwise import Case, pairwise
from tests.runtime.native_levels import assert_close, at, rounding, run, usual_size

at_each_level = pytest.mark.parametrize("level", LEVELS)
FACTORS: dict[str, tuple[Any, ...]] = {
    "body": tuple(MIDDLES),
    "layout": LAYOUTS,
    "transposed": (False, True),
    "biased": (False, True),
    "weighs": ("output", "input", "input's sigmoid", "middle", "no"),
    "router": ("", *ROUTERS),
    "shared": ("", "plain", "gated"),
    "tokens": (0, 1, 2, 7, 64, 300),
    "experts": (1, 3, 8, 64),
    "top_k": (1, 2, 3, 8),
    # D and F: whole tiles of AMX, parts of one, one number less and one more than a vector.
    "sizes": ((32, 64), (64, 32), (40, 24), (19, 37), (15, 17), (97, 130), (1, 1)),
    "dtype": ("float32", "bfloat16"),
    "load": ("random", "one", "dropped"),
}
_TOKENS = 32  # at least so many, to know how large numbers usually are


def _allowed(case: Case) -> bool:
    fits = case["top_k"] <= case["experts"]
    whole = bool(case["router"]) or not case["shared"]
    loaded = not case["router"] or case["load"] == "random"
    # Beside one output, which number of a token is its gate cannot be told.
    told = case["sizes"] != (1, 1) or case["shared"] != "gated"
    return fits and whole and loaded and told


CASES = pairwise(FACTORS, _allowed)


@cache
def _made(**case: Any) -> tuple[Made, Tensor, float]:
    """The layer, its exact answer, and how large numbers of it usually are."""
    tokens = case.pop("tokens")
    made = make(tokens=max(tokens, _TOKENS), **case)
    expected = made.expected()
    return _first(made, tokens), expected[:tokens], usual_size(expected)


def _first(made: Made, tokens: int) -> Made:
    given = isinstance(made.spec, ExpertsSpec)
    ids, weights = (made.ids[:tokens], made.weights[:tokens]) if given else (made.ids, made.weights)
    return replace(made, x=made.x[:tokens], ids=ids, weights=weights)


def _check(case: dict[str, Any], level: str) -> None:
    made, expected, usual = _made(**case)
    hidden, width = case["sizes"]
    allowed = rounding(
        made.x.dtype,
        hidden,
        2 * width if case.get("shared") else width,  # shared experts are as wide as two
        weighted_tokens=case.get("weighs", "").startswith("input"),
        gated=case.get("shared") == "gated",
    )
    assert_close(run(made, level), expected, allowed, usual)


@at_each_level
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers(case: Case, level: str) -> None:
    _check(case, level)


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 47, 64, 65, 101])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from([1, 2, 3, 5, 7, 16]))
    return {
        "body": draw(st.sampled_from(list(MIDDLES))),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "transposed": draw(st.booleans()),
        "biased": draw(st.booleans()),
        "tokens": draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 31, 33, 64, 97, 257])),
        "sizes": (draw(SIZES), draw(SIZES)),
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "load": draw(st.sampled_from(["random", "one", "dropped"])),
        "seed": draw(st.integers(0, 3)),
    }


@at_each_level
@settings(max_examples=60)
@given(case=cases())
def test_any_size(case: dict[str, Any], level: str) -> None:
    _check(case, level)


def experts(
    text: str, shapes: list[tuple[int, ...]], *, tokens: int, hidden: int, dtype: torch.dtype, count: int = 3
) -> Made:
    """Experts of that body; two of them for each token."""
    params = [(torch.randn(count, *s) * 0.3).to(dtype) for s in shapes]
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 2)
    ids = torch.rand(tokens, count).topk(2, dim=-1).indices
    return Made(ExpertsSpec(count, hidden, parse_body(text)), x, ids, weights, params, [], [])


D, F = 40, 24
UP, DOWN = (F, D), (D, F)
SWIGLU = "linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)"
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
few_and_many = pytest.mark.parametrize("tokens", [1, 3, 40])


def close(made: Made, level: str) -> None:
    assert_close(run(made, level), made.expected(), rounding(made.x.dtype, D, F))


@at_each_level
@both_dtypes
@few_and_many
@pytest.mark.parametrize(
    "kind", ["shared by all", "every other expert", "part of a row", "of a column", "odd"]
)
def test_matrices_that_are_views(kind: str, tokens: int, dtype: torch.dtype, level: str) -> None:
    """Gate and up lie alike, as the kernels want it; the last product's matrices lie as they like."""
    made = experts(SWIGLU, [UP, UP, DOWN], tokens=tokens, hidden=D, dtype=dtype)
    close(replace(made, params=[_view(p, kind) for p in made.params]), level)


def _view(tensor: Tensor, kind: str) -> Tensor:
    """The same sizes, and memory that lies otherwise, full of numbers that are not to be read."""
    count, rows, columns = tensor.shape
    match kind:
        case "shared by all":
            return tensor[1].expand(count, rows, columns)
        case "every other expert":
            view = torch.full((2 * count, rows, columns), torch.nan, dtype=tensor.dtype)[::2]
        case "part of a row":
            view = torch.full((count, rows, columns + 13), torch.nan, dtype=tensor.dtype)[..., 5:-8]
        case "of a column":
            view = torch.full((count, columns + 5, rows + 3), torch.nan, dtype=tensor.dtype)[:, 2:-3, 1:-2].mT
        case _:  # every third number of every other row, beginning at an odd one
            view = torch.full((count, 2 * rows + 1, 3 * columns), torch.nan, dtype=tensor.dtype)[
                :, 1::2, 1::3
            ]
    return view.copy_(tensor)


@at_each_level
@both_dtypes
@few_and_many
@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("linear(relu(linear(x,p0)),p1)", [UP, DOWN]),
        ("matmul(gelu(matmul(x,p0)),p1)", [(D, F), (F, D)]),
        ("mul(add(linear(silu(add(linear(x,p0),p1)),p2),p3),w)", [UP, (F,), DOWN, (D,)]),
        ("mul(linear(glu(linear(x,p0)),p1),w)", [(2 * F, D), DOWN]),
        # Outputs that are wider and narrower than x; one.
        ("mul(linear(relu(linear(x,p0)),p1),w)", [UP, (83, F)]),
        ("mul(linear(relu(linear(x,p0)),p1),w)", [UP, (3, F)]),
        ("mul(linear(relu(linear(x,p0)),p1),w)", [UP, (1, F)]),
        # Numbers of an expert: a scale, one in front of a slice.
        ("mul(linear(mul(silu(mul(linear(x,p0),p1)),p2),p3),p4)", [UP, (1,), (F,), DOWN, (1,)]),
        # Parts: from the end, of a vector, one number of it for a whole row, of a product that has more.
        (
            f"h=linear(x,p0); linear(mul(silu(slice(h,-{F},None,1)),slice(h,0,-{F},1)),p1)",
            [(2 * F, D), DOWN],
        ),
        (f"linear(mul(silu(linear(x,p0)),slice(p1,3,{F + 3},1)),p2)", [UP, (F + 9,), DOWN]),
        ("linear(mul(silu(linear(x,p0)),slice(p1,3,4,1)),p2)", [UP, (9,), DOWN]),
        (f"linear(mul(silu(linear(x,p0)),expand(slice(p1,3,4,1),{F})),p2)", [UP, (9,), DOWN]),
        (f"h=linear(x,p0); linear(silu(slice(h,5,{F + 5},1)),p1)", [(2 * F, D), DOWN]),
        ("mul(mul(linear(silu(linear(x,p0)),p1),w),w)", [UP, DOWN]),
        ("sub(w,linear(mul(silu(linear(x,p0)),add(w,1.0)),p1))", [UP, DOWN]),
        ("h=linear(x,p0); linear(mul(silu(h),h),p1)", [UP, DOWN]),
        # gpt-oss in full.
        (
            f"h=add(matmul(x,p0),p1); g=clamp(slice(h,0,{2 * F},2),None,0.7); "
            f"u=add(clamp(slice(h,1,{2 * F},2),-0.7,0.7),1.0); "
            "mul(add(matmul(mul(u,mul(g,sigmoid(mul(g,1.702)))),p2),p3),w)",
            [(D, 2 * F), (2 * F,), (F, D), (D,)],
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_other_bodies(
    text: str, shapes: list[tuple[int, ...]], tokens: int, dtype: torch.dtype, level: str
) -> None:
    close(experts(text, shapes, tokens=tokens, hidden=D, dtype=dtype), level)


@at_each_level
@both_dtypes
@few_and_many
@pytest.mark.parametrize("width", [1, 5, 23, 31, 33])
def test_a_term_that_is_infinite_at_zero(width: int, tokens: int, dtype: torch.dtype, level: str) -> None:
    """Hidden numbers that only fill a vector are not its value there."""
    text = "h=linear(x,p0); linear(where(eq(h,0.0),inf,h),p1)"
    close(experts(text, [(width, D), (D, width)], tokens=tokens, hidden=D, dtype=dtype), level)


@at_each_level
@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (f"h=linear(x,p0); linear(mul(silu(slice(h,0,1,1)),slice(h,1,{F + 1},1)),p1)", [(F + 1, D), DOWN]),
        ("linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)", [(1, D), UP, DOWN]),
        ("linear(add(silu(linear(x,p0)),p1),p2)", [(1, D), (F,), DOWN]),
        ("add(linear(silu(linear(x,p0)),p1),p2)", [UP, (1, F), (D,)]),
        (f"slice(linear(silu(linear(x,p0)),p1),0,{D - 3},1)", [UP, DOWN]),
        ("linear(softmax(linear(x,p0)),p1)", [UP, DOWN]),
        ("linear(atan(linear(x,p0)),p1)", [UP, DOWN]),
        ("add(linear(relu(linear(x,p0)),p1),x)", [UP, DOWN]),
        # A term of more lines than the kernels have room for.
        (
            "linear("
            + "".join(f"sin(mul({1 + i / 64}," for i in range(40))
            + "linear(x,p0)"
            + "))" * 40
            + ",p1)",
            [UP, DOWN],
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_the_kernels_do_not_know_runs_by_torch(
    text: str, shapes: list[tuple[int, ...]], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(level)
    monkeypatch.setenv(VARIABLE, level)
    made = experts(text, shapes, tokens=9, hidden=D, dtype=torch.float32)
    with pytest.raises(Unsupported):
        run(made, level)
    got = CpuExperts(to_text(made.spec))(made.x, made.ids, made.weights, made.params)
    assert_close(got, made.expected(), rounding(torch.float32, D, F))


@at_each_level
@few_and_many
@pytest.mark.parametrize("matrices", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_of_another_dtype(
    matrices: torch.dtype, vectors: torch.dtype, tokens: int, level: str
) -> None:
    """The hidden row is cast to what the last product's matrices are."""
    name = str(matrices).removeprefix("torch.")
    text = "mul(add(linear({},p3),p4),w)"
    hidden = "mul(silu(linear(x,p0)),add(linear(x,p1),p2))"
    shapes = [UP, UP, (F,), DOWN, (D,)]
    made = experts(text.format(f"cast({hidden},{name})"), shapes, tokens=tokens, hidden=D, dtype=matrices)
    params = [p.to(vectors) if p.dim() == 2 else p for p in made.params]
    params[2] = params[2][1].expand(3, F)  # of all experts
    params[4] = torch.stack([params[4], params[4].new_full((3, D), torch.nan)], dim=2)[..., 0]
    made = replace(made, params=params)
    exact = replace(made, spec=ExpertsSpec(3, D, parse_body(text.format(hidden)))).expected()
    assert_close(run(made, level), exact, rounding(matrices, D, F))
