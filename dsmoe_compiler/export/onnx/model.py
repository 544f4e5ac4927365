"""A fused program as an ONNX model in memory, its weights still where the model holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from torch.export import ExportedProgram

from dsmoe_compiler.export.onnx.axes import count_from_front
from dsmoe_compiler.export.onnx.carry import carry
from dsmoe_compiler.export.onnx.contrib import NotExpressible, contrib_form, lower_contrib
from dsmoe_compiler.export.onnx.initializers import drop_unused
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.lower import lower, plain
from dsmoe_compiler.export.onnx.names import name_dimensions, name_ends, name_nodes
from dsmoe_compiler.export.onnx.quantized_matrix import LayerError, quantized
from dsmoe_compiler.export.onnx.softmax_guards import drop_softmax_guards
from dsmoe_compiler.export.onnx.split_form import NotSplit, split_form
from dsmoe_compiler.ir import decompose
from dsmoe_compiler.ir.spec import to_text

Target = Literal["standard", "ort"]
Weights = Literal["int8", "int4"]
# The oldest that have what is used: of opset 21, blockwise DequantizeLinear.
_OPSET, _QUANTIZED_OPSET, _IR_VERSION = 20, 21, 10


@dataclass(frozen=True)
class LayerForm:
    """What a layer became: `form` is "Split", "MoE", "QMoE", "gathered weights", or "as written" where it was
    not fused; `remark` says why it is not what was asked for, "" if it is. `output` is the value that it
    gives, "" where that is not known.
    """

    name: str
    form: str
    remark: str
    output: str


@dataclass(frozen=True)
class Made:
    """The model, and what its layers became, in execution order. `errors` are those of the quantised matrices
    that were written so far.
    """

    model: ir.Model
    layers: tuple[LayerForm, ...]
    errors: Callable[[], tuple[LayerError, ...]]


def make(
    exported: ExportedProgram,
    *,
    names: Mapping[str, str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    target: Target,
    weights: Weights | None,
    metadata: Mapping[str, str],
) -> Made:
    """`names` are the layers', by the names of their ops in the graph; `inputs` and `outputs` what the
    graph's are to be called; `metadata` is what the model carries with it, as text.
    """
    forms = _Forms(target, weights)
    matrix, errors = quantized(weights) if weights else (plain, None)
    model = carry(exported, _QUANTIZED_OPSET if weights else _OPSET, names, forms.choose)
    called = {layer.number: layer.name for layer in forms.layers}
    lower_contrib(model, called, weights, errors)
    values = lower(model, called, matrix)
    model.ir_version = _IR_VERSION
    drop_softmax_guards(model.graph)
    count_from_front(model.graph)
    name_nodes(model.graph)
    for number, name in called.items():
        values[number].name = f"{name}/output".lstrip("/")
    name_ends(model.graph, inputs, outputs)
    name_dimensions(model.graph)
    drop_unused(model.graph)
    NameFixPass()(model)
    model.producer_name = "dsmoe_compiler"
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    layers = tuple(
        LayerForm(layer.name, form, remark, str(values[layer.number].name))
        for layer, (form, remark) in zip(forms.layers, forms.chosen, strict=True)
    )
    return Made(model, layers, errors.layers if errors else tuple)


class _Forms:
    """Chooses a form for each layer, and remembers which: "MoE" and why not, if not."""

    def __init__(self, target: Target, weights: Weights | None) -> None:
        self._target, self._weights = target, weights
        self.layers: list[Experts] = []
        self.chosen: list[tuple[str, str]] = []

    def choose(self, layer: Experts) -> Form:
        """The layer's form; those of `target` first, then those that can express anything."""
        self.layers.append(layer)
        remarks = list[str]()
        if self._target == "ort":
            try:
                form = contrib_form(layer, self._weights)
                self.chosen.append(("QMoE" if self._weights else "MoE", ""))
                return form
            except NotExpressible as e:
                remarks.append(f"not com.microsoft::MoE: {e}")
        try:
            form = split_form(layer)
            self.chosen.append(("Split", "; ".join(remarks)))
            return form
        except NotSplit as e:
            remarks.append(f"not cut by expert: {e}")
        self.chosen.append(("gathered weights", "; ".join(remarks)))
        text = to_text(layer.spec)
        return lambda x, ids, weights, params: decompose.experts(x, ids, weights, params, text)
