"""An expert may norm, scale, choose and project: it fuses, however the layer runs it."""

import pytest
import torch

from tests.passes.bodies import ACTIVATED, BODIES, WAYS, BodyFunction, D, Gathered, Layer, log_normalized
from tests.passes.checks import SHAPES, assert_same, compiled, only_layer, some_inputs


def _fuses(layer: Layer, dtype: torch.dtype = torch.float32) -> None:
    program = compiled(layer, width=D, verify="off")
    found = only_layer(program)
    assert found.fused, found.refusal
    # torch.export takes no empty batch through a logsumexp.
    shapes = [s for s in SHAPES if 0 not in s or layer.body is not log_normalized]
    assert_same(program, layer, some_inputs(D, dtype, shapes))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
def test_fuses(way: type[Layer], body: BodyFunction) -> None:
    torch.manual_seed(0)
    _fuses(way(body))


@pytest.mark.parametrize("body", ACTIVATED, ids=lambda b: b.__name__)
def test_activations_fuse(body: BodyFunction) -> None:
    torch.manual_seed(0)
    _fuses(Gathered(body))
