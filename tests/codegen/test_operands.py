"""What the tensors of a layer allow: descriptors, how large tiles are, whether there are kernels at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmoe_compiler.codegen.choice import choice_of
from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.codegen.gpu import for_target
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.load import load
from dsmoe_compiler.codegen.lowering import module_of
from dsmoe_compiler.codegen.operand import Operand
from dsmoe_compiler.codegen.record import launches
from tests.codegen.layers import Made, make


def _descriptors(made: Made) -> bool:
    """Whether a grouped plan on a GPU that has descriptors makes some; making one checks its tensor."""
    text = module_of(made.layer, choice_of(made.layer, 4096, for_target("sm_90"), "3.9.0"))
    module = load(text)
    given = {k: [t.to("meta") for t in v] if isinstance(v, list) else v for k, v in made.given(False).items()}
    given["x"] = made.x.to("meta")
    launches(module, lambda: module.layer(**given))
    return "TensorDescriptor.from_tensor" in text


def _shared(width: int) -> Made:
    """A layer whose own rows are whole 16 bytes, with shared experts of this width."""
    made = make(router="softmax", shared="plain", sizes=(64, 96), dtype="float16", experts=8)
    shared = [torch.randn(width, 64), torch.randn(width, 64), torch.randn(64, width)]
    return replace(made, shared=[t.half() for t in shared])


@pytest.mark.parametrize(("width", "descriptors"), [(192, True), (100, False), (99, False)])
def test_shared_experts_rows_decide_about_descriptors_too(width: int, descriptors: bool) -> None:
    assert _descriptors(_shared(width)) == descriptors


def test_tiles_are_made_for_the_widest_operand() -> None:
    layer = make(dtype="float16").layer
    up, down = layer.params
    assert layer.problem(64).dtype == "float16"
    assert replace(layer, x="float32").problem(64).dtype == "float32"
    assert replace(layer, params=(replace(up, dtype="float32"), down)).problem(64).dtype == "float32"
    layer = _shared(192).layer
    wide = tuple(replace(p, dtype="float32") for p in layer.shared_params)
    assert replace(layer, shared_params=wide).problem(64).dtype == "float32"


def _one_matrix(layer: Layer, up: Operand) -> Layer:
    return replace(layer, params=(up, *layer.params[1:]))


def test_a_matrix_that_int32_cannot_count_has_no_kernels() -> None:
    layer = make().layer
    up = layer.params[0]
    _, rows, columns = up.shape
    fits = replace(up, strides=(columns, (2**31 - 1) // rows, 1))
    assert _one_matrix(layer, fits).ffn.width == layer.ffn.width
    with pytest.raises(Unsupported, match="int32"):
        _ = _one_matrix(layer, replace(fits, strides=(columns, -(-(2**31) // rows), 1))).ffn


@pytest.mark.parametrize("which", ["x", "row"])
def test_float64_has_no_kernels(which: str) -> None:
    with pytest.raises(Unsupported, match="float64"):
        _ = replace(make().layer, **{which: "float64"}).ffn  # type: ignore[arg-type]
