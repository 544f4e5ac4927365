"""The target "ort": a layer as one node of onnxruntime's own, `com.microsoft::MoE`, in float32.

before:
    y = dsmoe::MoE(x, logits, params…; layer, slots, experts)
after:
    y = com.microsoft::MoE(x, logits, fc1, b1, fc2, b2; k, activation_type, …)

The model carries what the node computes as a function of standard operators of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from dsmoe_compiler.export.onnx.build import Builder
from dsmoe_compiler.export.onnx.contrib_ffn import KernelFfn, Linear, NotExpressible, kernel_ffn
from dsmoe_compiler.export.onnx.contrib_form import MOE, moe_form
from dsmoe_compiler.export.onnx.contrib_function import moe_function
from dsmoe_compiler.export.onnx.contrib_weights import Part, interleaved
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.ir.spec import ExpertsSpec, parse

__all__ = ["NotExpressible", "contrib_form", "lower_contrib"]

Weights = Literal["int8", "int4"] | None
_DOMAIN = "com.microsoft"
_OURS, _OP = MOE.split("::")


def contrib_form(experts: Experts, weights: Weights) -> Form:
    """The layer's experts in the form that `lower_contrib` knows. Raises NotExpressible, whose message is one
    line.
    """
    dtypes = {p.dtype for p in experts.params}
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise NotExpressible(f"its experts are {names}: onnxruntime's kernel computes in float32")
    spec = experts.spec
    ffn = kernel_ffn(spec, [[int(n) for n in p.shape] for p in experts.params])
    if ffn.weighs == "x" and experts.slots > 1:
        raise NotExpressible(f"the routing weight multiplies x, and there are {experts.slots} of them")
    if not experts.routing.distinct:
        raise NotExpressible("a token's experts may be the same one twice")
    if experts.routing.negative and ffn.weighs == "output" and experts.slots > 1:
        raise NotExpressible("routing weights may be negative")
    return lambda x, ids, routing, params: moe_form(
        x, ids, routing, params, spec, ffn.weighs, layer=experts.number, drops=experts.routing.drops
    )


@dataclass(frozen=True)
class _Layer:
    """A node of ours, what it is called and what it computes."""

    node: ir.Node
    name: str
    spec: ExpertsSpec
    ffn: KernelFfn


def lower_contrib(model: ir.Model, names: Mapping[int, str], weights: Weights) -> None:
    """Replace every `dsmoe::MoE` by onnxruntime's node, and add the function it stands for. `names` are the
    layers', by number.
    """
    layers = [_read(node, names) for node in model.graph if (node.domain, node.op_type) == (_OURS, _OP)]
    if not layers:
        return
    # A function has all of its inputs, so a bias that one layer has all layers get.
    ffns = [layer.ffn for layer in layers]
    biased = any(ffn.middle.first[0].bias for ffn in ffns), any(ffn.down.bias for ffn in ffns)
    known = dict[tuple[Part, ...], ir.Value]()
    for layer in layers:
        _lower(model.graph, layer, biased, known)
    activations = sorted({layer.ffn.middle.op for layer in layers})
    function = moe_function(model.graph.opset_imports[""], activations, biased=biased)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[_DOMAIN] = 1


def _read(node: ir.Node, names: Mapping[int, str]) -> _Layer:
    spec = parse(node.attributes.get_string("experts"), ExpertsSpec)
    shapes = [value.shape.numpy() for value in _params(node) if value.shape is not None]
    return _Layer(node, names[node.attributes.get_int("layer")], spec, kernel_ffn(spec, shapes))


def _params(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[2:] if value is not None]


def _lower(
    graph: ir.Graph, layer: _Layer, biased: tuple[bool, bool], known: dict[tuple[Part, ...], ir.Value]
) -> None:
    node, middle, down = layer.node, layer.ffn.middle, layer.ffn.down
    to = Builder(graph, f"{layer.name}/moe")
    tensors = _Tensors(to, layer, known)
    operands: list[ir.Value | None] = []
    products = (("fc1", middle.first, layer.ffn.width), ("fc2", (down,), layer.spec.hidden))
    for (name, linears, count), has_bias in zip(products, biased, strict=True):
        operands.append(tensors.matrices(name, linears, count))
        if linears[0].bias is not None:
            operands.append(tensors.biases(f"{name}_bias", linears, count))
        else:
            operands.append(tensors.zeros(f"{name}_bias", count * len(linears)) if has_bias else None)
    if operands[-1] is None:
        operands.pop()  # onnx's inliner takes no more inputs than the function has
    y = to.op(
        "MoE",
        *(*node.inputs[:2], *operands),
        domain=_DOMAIN,
        k=node.attributes.get_int("slots"),
        activation_type=middle.op,
        activation_alpha=middle.alpha,
        activation_beta=middle.beta,
        swiglu_limit=middle.limit,
        swiglu_fusion=int(middle.op == "swiglu"),
        normalize_routing_weights=1,
        use_sparse_mixer=0,
    )
    to.replace(node, y)


@dataclass
class _Tensors:
    """A layer's initializers; layers of the same weights share them: `known`, by what they are made of."""

    to: Builder
    layer: _Layer
    known: dict[tuple[Part, ...], ir.Value]

    def matrices(self, name: str, linears: Sequence[Linear], count: int) -> ir.Value:
        params, products = _params(self.layer.node), [linear.product for linear in linears]
        return self._of(name, [Part(params[p.param], p.first, p.step, count, p.transposed) for p in products])

    def biases(self, name: str, linears: Sequence[Linear], count: int) -> ir.Value:
        params, vectors = _params(self.layer.node), [b for linear in linears if (b := linear.bias)]
        return self._of(name, [Part(params[v.param], v.first, v.step, count) for v in vectors])

    def zeros(self, name: str, count: int) -> ir.Value:
        shape = (self.layer.spec.count, count)
        return self.to.weight(
            f"{self.layer.name}.{name}", shape, ir.DataType.FLOAT, lambda: np.zeros(shape, np.float32)
        )

    def _of(self, name: str, parts: Sequence[Part]) -> ir.Value:
        key = tuple(parts)
        if key not in self.known:
            self.known[key] = interleaved(self.to, f"{self.layer.name}.{name}", parts)
        return self.known[key]
