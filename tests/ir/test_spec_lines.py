"""A spec laid out over lines is the same spec."""

import pytest

from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec, parse
from dsmoe_compiler.ir.spec_lines import spec_lines

BODY = parse_body(
    "h=add(linear(x,p0),p1); mul(linear(mul(silu(slice(h,0,1408,1)),slice(h,1408,2816,1)),p2),w)"
)
SHARED = SharedSpec(parse_body("linear(mul(silu(linear(x,p0)),linear(x,p1)),p2)"), 2816)
SPECS = (
    MoESpec(6, ExpertsSpec(64, 2048, BODY), RouterSpec(6, "softmax"), SHARED),
    MoESpec(2, ExpertsSpec(8, 64, parse_body("mul(linear(relu(linear(x,p0)),p1),w)"), "bfloat16")),
    MoESpec(
        8,
        ExpertsSpec(256, 7168, BODY),
        RouterSpec(
            8,
            "sigmoid",
            selection_bias=True,
            groups=8,
            top_groups=4,
            group_score="top2",
            group_fill=float("-inf"),
            renormalize=True,
            scale=2.5,
        ),
    ),
)


@pytest.mark.parametrize("width", (40, 80, 104, 1000))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reads_back(spec: MoESpec, width: int) -> None:
    lines = spec_lines(spec.text, width)
    assert parse("\n".join(lines), MoESpec) == spec
    assert (len(lines) == 1) == (width == 1000)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fits_a_page(spec: MoESpec) -> None:
    lines = spec_lines(spec.text, 104)
    assert all(len(line) <= 104 for line in lines) and len(lines) <= 8
