"""A fused program as an ONNX model in memory, its weights still where the model holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from torch.export import ExportedProgram

from dsmoe_compiler.export.onnx import lower as standard
from dsmoe_compiler.export.onnx.carry import carry
from dsmoe_compiler.export.onnx.initializers import drop_unused
from dsmoe_compiler.export.onnx.layer import Experts, Form
from dsmoe_compiler.export.onnx.names import name_dimensions, name_ends, name_nodes
from dsmoe_compiler.export.onnx.split_form import NotSplit, split_form
from dsmoe_compiler.ir import decompose
from dsmoe_compiler.ir.spec import to_text

Target = Literal["standard", "ort"]
Weights = Literal["int8", "int4"]
TARGETS, WEIGHTS = get_args(Target), get_args(Weights)
# The oldest that have what is used: of opset 21, blockwise DequantizeLinear.
_OPSET, _QUANTIZED_OPSET, _IR_VERSION = 20, 21, 10


@dataclass(frozen=True)
class LayerForm:
    """What a layer became: `form` is "Split", "MoE", "QMoE" or "gathered weights"; `remark` says why it is
    not what was asked for, "" if it is. `output` is the value that the layer gives.
    """

    name: str
    form: str
    remark: str
    output: str


@dataclass(frozen=True)
class Made:
    """The model, and what its layers became, in execution order."""

    model: ir.Model
    layers: tuple[LayerForm, ...]


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
    forms = _Forms()
    opset = _QUANTIZED_OPSET if weights else _OPSET
    model = carry(exported, opset, names, forms.choose)
    values = standard.lower(model, forms.names, standard.plain)
    model.ir_version = _IR_VERSION
    name_nodes(model.graph)
    for layer in forms.layers:
        values[layer.number].name = f"{layer.name}/output".lstrip("/")
    name_ends(model.graph, inputs, outputs)
    name_dimensions(model.graph)
    drop_unused(model.graph)
    NameFixPass()(model)
    model.producer_name, model.producer_version = "dsmoe_compiler", metadata.get("dsmoe.version", "")
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    kinds = zip(forms.layers, forms.made, strict=True)
    return Made(
        model,
        tuple(LayerForm(e.name, form, why, str(values[e.number].name)) for e, (form, why) in kinds),
    )


class _Forms:
    """Chooses a form for each layer, and remembers which."""

    def __init__(self) -> None:
        self.layers: list[Experts] = []
        self.made: list[tuple[str, str]] = []

    @property
    def names(self) -> dict[int, str]:
        return {e.number: e.name for e in self.layers}

    def choose(self, layer: Experts) -> Form:
        self.layers.append(layer)
        try:
            form = split_form(layer)
        except NotSplit as e:
            self.made.append(("gathered weights", str(e)))
            return lambda x, ids, weights, params: decompose.experts(
                x, ids, weights, params, to_text(layer.spec)
            )
        self.made.append(("Split", ""))
        return form
