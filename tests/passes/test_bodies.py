"""An expert may norm, scale, choose and project: it fuses, however the layer runs it."""

from typing import Any

import pytest
import torch

from tests.passes.bodies import (
    ACTIVATED,
    BODIES,
    EXPERTS,
    NO_BODIES,
    WAYS,
    BodyFunction,
    D,
    Dense,
    DenseByEinsum,
    Gathered,
    Layer,
    Looped,
    log_normalized,
)
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


# Rows as many as experts, or as wide as they are many, so that no size can tell dimensions apart.
PLACES = {"dynamic": ((2, 5), True), "T = E": ((1, EXPERTS), False), "T = D": ((1, D), False)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", [Looped, Gathered, Dense, DenseByEinsum], ids=lambda w: w.__name__)
@pytest.mark.parametrize("body", NO_BODIES, ids=lambda b: b.__name__)
def test_what_mixes_rows_runs_as_written(body: BodyFunction, way: type[Layer], place: str) -> None:
    torch.manual_seed(0)
    layer = way(body)
    shape, dynamic = PLACES[place]
    options: dict[str, Any] = {} if dynamic else {"dynamic_shapes": None}
    program = compiled(layer, shape, D, verify="off", **options)
    assert not only_layer(program).fused
    assert_same(program, layer, [torch.randn(*shape, D)])
