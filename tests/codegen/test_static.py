"""No default plan spills, and Hopper's plans use what Hopper has; without a GPU, by compiling them."""

from __future__ import annotations

import pytest
import torch
import triton

from benchmarks import static
from benchmarks.moe_shapes import SHAPES, TOKENS
from benchmarks.static import TARGETS, Line

# Cores multiply 16-bit numbers in these; whatever else is launched only moves and adds.
PRODUCTS = frozenset({"grouped_up", "grouped_down", "shared_up", "shared_down"})
_RECORDED = "3.9.0"


def check(line: Line, target: str) -> None:
    """What holds for every kernel of a default plan."""
    assert (line.spill_stores, line.spill_loads) == (0, 0), line
    assert line.resident >= 1, line
    if line.kernel in PRODUCTS:
        assert line.wgmma + line.mma > 0, line
    if target == "sm_90" and line.tokens >= 4096 and line.kernel in PRODUCTS:
        assert line.wgmma > 0 and line.tma_loads > 0, line
        assert line.warps < 8 or line.registers <= 200, line


@pytest.mark.parametrize(
    ("target", "shape", "tokens"),
    [
        *(("sm_90", shape, tokens) for shape in ("S1", "S6") for tokens in (1, 64, 4096)),
        *((target, shape, 4096) for target in ("sm_80", "gfx942") for shape in ("S1", "S6")),
        ("sm_80", "S1", 1),
    ],
)
def test_default_plans(target: str, shape: str, tokens: int) -> None:
    found = list(static.lines(target, [shape], [tokens]))
    assert len(found) >= 2
    for line in found:
        check(line, target)


@pytest.mark.parametrize(("shape", "tokens"), [("S1", 4096), ("S6", 64)])
def test_float16_is_multiplied_as_bfloat16_is(shape: str, tokens: int) -> None:
    for line in static.lines("sm_90", [shape], [tokens], torch.float16):
        check(line, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_default_plan(target: str) -> None:
    for line in static.lines(target, tuple(SHAPES), TOKENS):
        check(line, target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_table_is_whole(target: str) -> None:
    table = static.read(target)
    assert {(line.shape, line.tokens) for line in table} == {(s, t) for s in SHAPES for t in TOKENS}
    for line in table:
        check(line, target)


@pytest.mark.skipif(triton.__version__ != _RECORDED, reason=f"the committed table is of Triton {_RECORDED}")
@pytest.mark.parametrize(("shape", "tokens"), [("S3", 1), ("S3", 512), ("S5", 4096)])
def test_the_committed_table_is_what_compiles(shape: str, tokens: int) -> None:
    committed = [x for x in static.read("sm_90") if (x.shape, x.tokens) == (shape, tokens)]
    assert committed == list(static.lines("sm_90", [shape], [tokens]))


def test_a_spill_is_seen() -> None:
    line = static.read("sm_90")[0]
    with pytest.raises(AssertionError):
        check(static.Line(**{**vars(line), "spill_stores": 1}), "sm_90")
