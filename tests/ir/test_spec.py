"""A spec is the same spec after a round through its text, and refuses what makes no sense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec, parse, to_text
from tests.ir.test_body import bodies

_DTYPE = st.sampled_from([None, "float32", "bfloat16"])
_FLOAT = st.floats(allow_nan=False, width=32)


@st.composite
def routers(draw: st.DrawFn) -> RouterSpec:
    after = draw(st.booleans())
    return RouterSpec(
        top_k=draw(st.integers(1, 8)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        select="logits" if after else "scores",
        renormalize=draw(st.booleans()),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-6])),
        scale=draw(_FLOAT),
        logits_bias=draw(st.booleans()),
        selection_bias=not after and draw(st.booleans()),
        groups=1 if after else draw(st.integers(1, 4)) * 2,
        top_groups=1,
        group_score=draw(st.sampled_from(["max", "top2"])),
        group_fill=draw(st.sampled_from([0.0, float("-inf")])),
        logits_dtype=draw(_DTYPE),
        score_dtype=draw(_DTYPE),
        weight_dtype=draw(_DTYPE),
    )


@st.composite
def layers(draw: st.DrawFn) -> MoESpec:
    body = draw(bodies().filter(lambda b: b.param_count > 0))
    experts = ExpertsSpec(draw(st.integers(1, 300)), draw(st.integers(1, 9000)), body, draw(_DTYPE))
    router = draw(st.none() | routers())
    shared = draw(
        st.none() | st.builds(SharedSpec, bodies().filter(lambda b: not b.uses("w")), st.integers(1, 99))
    )
    return MoESpec(router.top_k if router else draw(st.integers(1, 8)), experts, router, shared)


@given(layers())
def test_text_round_trip(spec: MoESpec) -> None:
    assert parse(spec.text, MoESpec) == spec
    assert "\n" not in spec.text
    assert parse(to_text(spec.experts), ExpertsSpec) == spec.experts


@given(layers())
def test_every_spec_has_one_line_for_people(spec: MoESpec) -> None:
    assert "\n" not in str(spec) and f"E={spec.experts.count}" in str(spec)


@pytest.mark.parametrize(
    "text", ["", "moe()", "router(top_k=2)", 'router(top_k=2,score="softmax")', "open('x')", "1"]
)
def test_what_is_no_layer(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse(text, MoESpec)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"groups": 2, "top_groups": 3},
        {"select": "logits", "selection_bias": True},
        {"select": "logits", "groups": 2},
        {"score_dtype": "int32"},
    ],
    ids=str,
)
def test_routers_that_make_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        RouterSpec(**{"top_k": 2, "score": "softmax", **fields})  # type: ignore[arg-type]
