"""A layer's routed experts as they lie in a program, and what they may become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from dsmoe_compiler.export.onnx.routing import Routing
from dsmoe_compiler.ir.spec import ExpertsSpec

# What `dsmoe::experts` of a layer becomes: (x_TD, ids_TK, weights_TK, params) -> out (T, out width).
Form: TypeAlias = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Experts:
    """`number` in the graph's order, `name` its module, `slots` K, `params` the experts' tensors (fake ones,
    E first).
    """

    number: int
    name: str
    spec: ExpertsSpec
    routing: Routing
    slots: int
    params: tuple[Tensor, ...]
