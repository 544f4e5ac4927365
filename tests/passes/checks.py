"""Compile a layer and hold the program against eager.

How far apart two right answers may be, relative to the largest number: with widths of at most 64 and
values of unit size, a sum of 64 products accumulated in fp32 in two orders differs by about
sqrt(64)·2⁻²⁴ = 5e-7, twice in a row and summed over K; 1e-5 leaves an order of room. In bfloat16 each
side rounds at most 8 intermediates by 2⁻⁹: 8·2⁻⁸ = 3e-2 when every one falls on the other side; float16
has 3 bits more: 4e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.ir.errors import Refusal
from dsmoe_compiler.program import Program
from dsmoe_compiler.report.report import LayerReport

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = ((3, 4), (1, 1), (0, 2), (1, 17))


def compiled(layer: nn.Module, shape: tuple[int, ...] = (2, 5), width: int = 16, **options: Any) -> Program:
    """The layer compiled on random numbers of `shape`, sizes dynamic unless the options say otherwise."""
    dtype = next(layer.parameters()).dtype
    return dsmoe.compile(layer, (torch.randn(*shape, width, dtype=dtype),), **options)


def only_layer(program: Program) -> LayerReport:
    """The report of the program's one layer."""
    (found,) = program.report.layers
    return found


def refusal(program: Program) -> Refusal:
    """Why the program's one layer was refused."""
    found = only_layer(program)
    assert not found.fused and found.refusal is not None, f"not refused: {found.spec}"
    return found.refusal


def assert_same(program: Program, layer: nn.Module, inputs: Sequence[Tensor]) -> None:
    """The program gives eager's numbers on every input; each runs on the state eager found."""
    for x in inputs:
        state = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            expected = layer(x.clone())
            layer.load_state_dict(state)
            actual = program(x.clone())
        layer.load_state_dict(state)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[x.dtype] * max(scale, 1e-3))


def some_inputs(
    width: int, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    """Random inputs: none, one and other numbers of tokens."""
    return [torch.randn(*shape, width, dtype=dtype) for shape in shapes]
