"""The target "ort": a layer as one node of onnxruntime's own: `com.microsoft::MoE` in float32, or `QMoE` of
matrices in 8 or 4 bits.

before:
    y = dsmoe::MoE(x, logits, params…; layer, slots, experts)
after:
    y = com.microsoft::MoE(x, logits, fc1, b1, fc2, b2; k, activation_type, …)
    y = com.microsoft::QMoE(x, logits, fc1, s1, b1, fc2, s2, b2, , , , z1, z2; k, activation_type, …)

The model carries what the node computes as a function of standard operators of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from dsmoe_compiler.export.onnx.contrib_ffn import NotExpressible, kernel_ffn
from dsmoe_compiler.export.onnx.contrib_form import moe_form
from dsmoe_compiler.export.onnx.contrib_function import moe_function
from dsmoe_compiler.export.onnx.contrib_node import DOMAIN, Lowering, layers_of
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.quantized_matrix import Errors, Weights, form_of

__all__ = ["NotExpressible", "contrib_form", "lower_contrib"]


def contrib_form(experts: Experts, weights: Weights | None) -> Form:
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
    if weights is not None:
        _require_blocks(ffn.width, spec.hidden)
    return lambda x, ids, routing, params: moe_form(
        x, ids, routing, params, spec, ffn.weighs, layer=experts.number, drops=experts.routing.drops
    )


def _require_blocks(*widths: int) -> None:
    block = form_of("int8").block
    if any(width % block for width in widths):
        raise NotExpressible(f"onnxruntime's kernel takes whole numbers in whole blocks of {block}")


def lower_contrib(
    model: ir.Model, names: Mapping[int, str], weights: Weights | None, errors: Errors | None = None
) -> None:
    """Replace every `dsmoe::MoE` by onnxruntime's node, and add the functions that those stand for. `names`
    are the layers', by number; `errors` is told, when weights are written, what quantising did to them.
    """
    layers = layers_of(model.graph, names)
    form = form_of(weights) if weights else None
    lowering = Lowering(layers, form, errors)
    opset = model.graph.opset_imports[""]
    for is_quantized in (False, True):
        made = [layer for layer in layers if lowering.is_quantized(layer) == is_quantized]
        if not made:
            continue
        for layer in made:
            lowering.lower(model.graph, layer)
        inputs, unread = lowering.inputs(is_quantized)
        activations = sorted({layer.ffn.middle.op for layer in made})
        function = moe_function(opset, activations, inputs, unread, form if is_quantized else None)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1
