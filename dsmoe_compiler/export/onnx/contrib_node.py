"""One layer's node of onnxruntime's, in the place of the `dsmoe::MoE` that it was carried by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dsmoe_compiler.export.onnx.build import Attribute, Builder
from dsmoe_compiler.export.onnx.contrib_ffn import KernelFfn, Linear, kernel_ffn
from dsmoe_compiler.export.onnx.contrib_form import MOE
from dsmoe_compiler.export.onnx.contrib_quantized import ACCURACY_LEVEL, quantized
from dsmoe_compiler.export.onnx.contrib_weights import Part, Rows
from dsmoe_compiler.export.onnx.quantize import Blockwise
from dsmoe_compiler.export.onnx.quantized_matrix import Errors
from dsmoe_compiler.ir.spec import ExpertsSpec, parse

DOMAIN = "com.microsoft"
# The operators' inputs after x and the logits. (Of fc3, s3, b3 the kernels want none.)
_INPUTS = ("fc1", "b1", "fc2", "b2")
_QUANTIZED_INPUTS = ("fc1", "s1", "b1", "fc2", "s2", "b2", "fc3", "s3", "b3", "z1", "z2")


@dataclass(frozen=True)
class Layer:
    """A node of ours, what it is called and what it computes."""

    node: ir.Node
    name: str
    spec: ExpertsSpec
    ffn: KernelFfn

    def products(self) -> tuple[Rows, Rows]:
        """The matrices of gate and up or of the first product, and of the last: (E, out, in)."""
        first, last = self._linears
        return self._matrices(first, self.ffn.width), self._matrices(last, self.spec.hidden)

    def biases(self) -> tuple[Rows | None, Rows | None]:
        """Theirs, (E, out), where they have any."""
        first, last = self._linears
        return self._vectors(first, self.ffn.width), self._vectors(last, self.spec.hidden)

    @property
    def _linears(self) -> tuple[Sequence[Linear], Sequence[Linear]]:
        return self.ffn.middle.first, (self.ffn.down,)

    def _matrices(self, linears: Sequence[Linear], count: int) -> Rows:
        params, products = _params(self.node), [linear.product for linear in linears]
        return Rows([Part(params[p.param], p.first, p.step, count, p.transposed) for p in products])

    def _vectors(self, linears: Sequence[Linear], count: int) -> Rows | None:
        params, vectors = _params(self.node), [b for linear in linears if (b := linear.bias)]
        return Rows([Part(params[v.param], v.first, v.step, count) for v in vectors]) if vectors else None


def layers_of(graph: ir.Graph, names: Mapping[int, str]) -> list[Layer]:
    """The layers that are carried by `dsmoe::MoE`; `names` are theirs, by number."""
    ours = tuple(MOE.split("::"))
    return [_layer(node, names) for node in graph if (node.domain, node.op_type) == ours]


def _layer(node: ir.Node, names: Mapping[int, str]) -> Layer:
    spec = parse(node.attributes.get_string("experts"), ExpertsSpec)
    shapes = [value.shape.numpy() for value in _params(node) if value.shape is not None]
    return Layer(node, names[node.attributes.get_int("layer")], spec, kernel_ffn(spec, shapes))


def _params(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[2:] if value is not None]


class Lowering:
    """Lowers the layers of one model, all with the same inputs: the function that they stand for has all of
    its inputs, so a bias that one layer has, all have.

    Matrices are quantised in the `form`, if any; those that the model computes stay as they are.
    """

    def __init__(self, layers: Sequence[Layer], form: Blockwise | None, errors: Errors | None) -> None:
        self._form, self._errors = form, errors
        found = [layer.biases() for layer in layers]
        self._biased = [any(biases[i] is not None for biases in found) for i in (0, 1)]
        # Layers of the same weights share them: what tensors are called, by what they are made of.
        self._names = dict[tuple[Part, ...], str]()

    def is_quantized(self, layer: Layer) -> bool:
        """Whether its matrices are to be whole numbers."""
        return self._form is not None and all(rows.is_stored for rows in layer.products())

    def inputs(self, is_quantized: bool) -> tuple[list[str], set[str]]:
        """The operator's inputs after the logits, up to the last that nodes have, and those that they do not
        have.
        """
        absent = {f"b{i}" for i, has in enumerate(self._biased, 1) if not has} | {"fc3", "s3", "b3"}
        if self._form is None or self._form.symmetric:
            absent |= {"z1", "z2"}
        names = list(_QUANTIZED_INPUTS if is_quantized else _INPUTS)
        while names[-1] in absent:
            names.pop()
        return names, absent.intersection(names)

    def lower(self, graph: ir.Graph, layer: Layer) -> None:
        """Put onnxruntime's node in the place of the layer's."""
        is_quantized = self.is_quantized(layer)
        node, middle = layer.node, layer.ffn.middle
        to = Builder(graph, f"{layer.name}/moe".lstrip("/"))
        values = self._values(to, layer, is_quantized)
        attributes: dict[str, Attribute] = {
            "k": node.attributes.get_int("slots"),
            "activation_type": middle.op,
            "activation_alpha": middle.alpha,
            "activation_beta": middle.beta,
            "swiglu_limit": middle.limit,
            "swiglu_fusion": int(middle.op == "swiglu"),
            "normalize_routing_weights": 1,
            "use_sparse_mixer": 0,
        }
        if is_quantized and self._form is not None:
            attributes |= {
                "expert_weight_bits": self._form.bits,
                "block_size": self._form.block,
                "accuracy_level": ACCURACY_LEVEL,
            }
        op = "QMoE" if is_quantized else "MoE"
        names, _ = self.inputs(is_quantized)
        operands = [*node.inputs[:2], *(values.get(name) for name in names)]
        to.replace(node, to.op(op, *operands, domain=DOMAIN, **attributes))

    def _values(self, to: Builder, layer: Layer, is_quantized: bool) -> dict[str, ir.Value | None]:
        values = dict[str, ir.Value | None]()
        for i, (rows, bias) in enumerate(zip(layer.products(), layer.biases(), strict=True), 1):
            name = self._name(to.graph, layer, f"fc{i}", rows)
            if is_quantized and self._form is not None:
                codes, scales, zeros = quantized(to, name, rows, self._form, self._errors)
                values |= {f"fc{i}": codes, f"s{i}": scales, f"z{i}": zeros}
            else:
                values[f"fc{i}"] = rows.value(to, name)
            if bias is not None:
                values[f"b{i}"] = bias.value(to, self._name(to.graph, layer, f"fc{i}_bias", bias))
            elif self._biased[i - 1]:
                values[f"b{i}"] = _zeros(to, (rows.experts, rows.shape[0]))
        return values

    def _name(self, graph: ir.Graph, layer: Layer, product: str, rows: Rows) -> str:
        if rows.parts not in self._names:
            name = f"{layer.name}.{product}".lstrip(".")
            while name in graph.initializers or name in self._names.values():
                name = f"{name}_"  # the model has a weight of its own that is called so
            self._names[rows.parts] = name
        return self._names[rows.parts]


def _zeros(to: Builder, shape: tuple[int, int]) -> ir.Value:
    name = f"dsmoe.zeros.{shape[0]}x{shape[1]}"
    return to.weight(name, shape, ir.DataType.FLOAT, lambda: np.zeros(shape, np.float32))
