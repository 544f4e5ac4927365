"""What a rule once got wrong stays right, also with nothing checking the rewrites."""

import pytest
import torch

from tests.passes.broken_once import BROKEN, WIDTH, Broken, Layer
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
