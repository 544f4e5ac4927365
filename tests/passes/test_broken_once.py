"""What a rule once got wrong stays right, also with nothing checking the rewrites."""

import pytest
import torch

from tests.passes.broken_once import BROKEN, SEVERAL, WIDTH, Broken, Layer, Several, summed_in_fp32
from tests.passes.checks import assert_same, compiled, only_layer

SHAPES = ((2, 5), (3, 12), (1, 40))


@pytest.mark.parametrize("verify", ["numeric", "off"])
@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_computes_what_eager_computes(case: Broken, verify: str) -> None:
    torch.manual_seed(0)
    layer = Layer(case.written)
    inputs = [torch.randn(*shape, WIDTH) for shape in SHAPES]
    program = compiled(layer, SHAPES[0], verify=verify)
    found = only_layer(program)
    if case.becomes == "fused":
        assert found.fused, found.refusal
    else:
        assert found.refusal is not None and found.refusal.code == case.becomes, found.refusal
        assert case.because in found.refusal.because
    assert_same(program, layer, inputs)


@pytest.mark.parametrize("verify", ["numeric", "off"])
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_layers_that_meet_all_fuse(case: Several, verify: str) -> None:
    """What one layer was checked with is what the other became."""
    torch.manual_seed(0)
    layer = Layer(case.written)
    program = compiled(layer, SHAPES[0], verify=verify)
    assert [found.fused for found in program.report.layers] == [True] * case.layers, program.report
    assert_same(program, layer, [torch.randn(*shape, WIDTH) for shape in SHAPES])


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("verify", ["numeric", "off"])
def test_bf16_experts_summed_in_fp32_are_within_rounding(verify: str, cast: bool) -> None:
    """What differs is what bf16 rounds, whichever type the sum has."""
    torch.manual_seed(0)
    layer = Layer(lambda m, x: summed_in_fp32(m, x).to(x.dtype if cast else torch.float32)).bfloat16()
    program = compiled(layer, SHAPES[0], verify=verify)
    assert only_layer(program).fused, only_layer(program).refusal
    assert_same(program, layer, [torch.randn(*shape, WIDTH, dtype=torch.bfloat16) for shape in SHAPES])
