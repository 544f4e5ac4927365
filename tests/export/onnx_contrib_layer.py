"""Tiny layers on their way to onnxruntime's operators: captured, carried, lowered, and run three ways.

T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from dsmoe_compiler.export.onnx import contrib, lower
from dsmoe_compiler.export.onnx.carry import carry
from dsmoe_compiler.export.onnx.contrib_ffn import NotExpressible
from dsmoe_compiler.export.onnx.initializers import drop_unused
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.quantized_matrix import Weights
from dsmoe_compiler.export.onnx.routing import Routing
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.body import parse_body
from dsmoe_compiler.ir.spec import ExpertsSpec, to_text

E, K, D, F = 5, 2, 8, 6
SWIGLU = "h=linear(x,p0); mul(linear(mul(silu(slice(h,0,6,1)),slice(h,6,12,1)),p1),w)"
SHAPES = {"up": (E, 2 * F, D), "down": (E, D, F)}
KNOWN = Routing(drops=False, distinct=True, negative=False)
Array = np.ndarray[Any, np.dtype[Any]]


class Layer(nn.Module):
    """Experts between other nodes: tanh, the experts, a sum."""

    def __init__(
        self, body: str = SWIGLU, shapes: Sequence[Sequence[int]] | None = None, **spec: Any
    ) -> None:
        super().__init__()
        shapes = list(SHAPES.values()) if shapes is None else shapes
        self.params = nn.ParameterList([nn.Parameter(torch.randn(*s) * 0.5) for s in shapes])
        hidden = spec.pop("hidden", D)
        self.spec = ExpertsSpec(shapes[0][0], hidden, parse_body(body), **spec)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out: Tensor = ops.EXPERTS(x_TD.tanh(), ids_TK, weights_TK, list(self.params), to_text(self.spec))
        return out + 0.25


class Two(nn.Module):
    """Layers one after the other, with a residual."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD, ids_TK, weights_TK)
        return x_TD


def tokens(count: int, slots: int = K, experts: int = E, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D), ids (T, K) that differ, weights (T, K) of any sum."""
    ids = torch.rand(count, experts).topk(slots, dim=-1).indices
    return torch.randn(count, width), ids, torch.rand(count, slots) + 0.1


def exported_to_ort(
    module: nn.Module,
    args: Sequence[Tensor],
    routing: Routing | None = KNOWN,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """The module as a model, its layers as onnxruntime's nodes; T is dynamic. `routing` is taken for granted;
    None: what the graph shows.
    """
    shapes = [{0: torch.export.Dim.DYNAMIC}] * len(args)
    exported = torch.export.export(module, tuple(args), dynamic_shapes=tuple(shapes))
    seen = dict[int, str]()

    def choose(experts: Experts) -> Form:
        seen[experts.number] = f"layers.{experts.number}"
        known = experts if routing is None else replace(experts, routing=routing)
        return contrib.contrib_form(known, weights)

    model = carry(exported, 21 if weights else 20, {}, choose)
    contrib.lower_contrib(model, seen, weights)
    lower.lower(model, seen, lower.plain)
    model.ir_version = 10
    drop_unused(model.graph)
    NameFixPass()(model)
    proto: onnx.ModelProto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def why_not(layer: Layer, slots: int = K, routing: Routing = KNOWN, weights: Weights | None = None) -> str:
    """What is said of a layer that no kernel computes."""
    params = tuple(p.detach() for p in layer.params)
    try:
        contrib.contrib_form(Experts(0, "layer", layer.spec, routing, slots, params), weights)
    except NotExpressible as e:
        return str(e)
    raise AssertionError("a kernel computes it")


Run = Callable[[Sequence[Tensor]], list[Array]]


def in_onnxruntime(model: onnx.ModelProto, threads: int = 1) -> Run:
    """The model in onnxruntime, with its kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    return lambda args: _arrays(session.run(None, _feeds(names, args)))


def in_reference(model: onnx.ModelProto) -> Run:
    """The model in `onnx.reference`, which knows no operator of onnxruntime's."""
    evaluator = ReferenceEvaluator(model)
    return lambda args: _arrays(evaluator.run(None, _feeds(evaluator.input_names, args)))


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its functions: of standard operators alone."""
    made = onnx.inliner.inline_local_functions(model)
    assert {node.domain for node in made.graph.node} <= {""}
    return made


def _feeds(names: Sequence[str], args: Sequence[Tensor]) -> dict[str, Array]:
    return {name: arg.numpy() for name, arg in zip(names, args, strict=True)}


def _arrays(outputs: object) -> list[Array]:
    assert isinstance(outputs, list)
    return [np.asarray(output) for output in outputs]
