"""Layers of any kind, drawn at random: the wide grid behind the covering set of test_layer.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_compiler.codegen.tiles import Decode, GemmTiles, GemvTiles, Grouped, Plan
from tests.codegen.layers import LAYOUTS, MIDDLES, ROUTERS, make
from tests.codegen.test_layer import ALLOWED, error, run

_POWERS = st.sampled_from([16, 32, 64])


@st.composite
def _tiles(draw: st.DrawFn, tma: bool) -> GemmTiles:
    return GemmTiles(draw(_POWERS), draw(_POWERS), draw(_POWERS), 4, 2, swap=draw(st.booleans()), tma=tma)


@st.composite
def _gemv(draw: st.DrawFn, splits: tuple[int, ...]) -> GemvTiles:
    return GemvTiles(
        draw(st.sampled_from([4, 8, 32])), draw(_POWERS), 4, 1, split=draw(st.sampled_from(splits))
    )


@st.composite
def _cases(draw: st.DrawFn) -> tuple[dict[str, Any], Plan]:
    aligned = draw(st.booleans())
    step = 8 if aligned else 1
    sizes = (step * draw(st.integers(1, 9)), step * draw(st.integers(1, 9)))
    experts = draw(st.integers(1, 70))
    tokens = draw(st.integers(0, 40))
    top_k = draw(st.integers(1, min(experts, 9)))
    router = draw(st.sampled_from(["", *ROUTERS]))
    kind = {
        "body": draw(st.sampled_from(list(MIDDLES))),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "transposed": draw(st.booleans()),
        "biased": draw(st.booleans()),
        "weighs": draw(st.sampled_from(["output", "input", "middle"])),
        "router": router,
        "shared": draw(st.sampled_from(["", "plain", "gated"])) if router else "",
        "load": "random" if router else draw(st.sampled_from(["random", "one", "dropped"])),
        "dtype": draw(st.sampled_from(["float32", "float16"])),
        "seed": draw(st.integers(0, 1 << 16)),
    }
    kind |= {"sizes": sizes, "experts": experts, "tokens": tokens, "top_k": top_k}
    if tokens * top_k <= 12 and draw(st.booleans()):
        return kind, Decode(draw(_gemv((1, 2, 3))), draw(_gemv((1,))))
    tma = aligned and draw(st.booleans())
    return kind, Grouped(draw(_tiles(tma)), draw(_tiles(tma)), draw(st.integers(1, 4)))


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_cases())
def test_equals_the_reference(case: tuple[dict[str, Any], Plan]) -> None:
    kind, plan = case
    made = make(**kind)
    assert error(made, run(made, plan)) <= ALLOWED[kind["dtype"]]
