"""What is known of the graph in an `.onnx` file, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Size, TensorType, Value
from dsmoe_compiler.graph_diff.layers import fused_layer, in_order
from dsmoe_compiler.graph_diff.onnx_model import read_model
from dsmoe_compiler.graph_diff.onnx_nodes import Nodes
from dsmoe_compiler.graph_diff.onnx_tensors import TensorReader, dtype_name
from dsmoe_compiler.ir.spec import MoESpec, parse

_OURS, _LAYER = "dsmoe.", "dsmoe.layer."  # how keys of the metadata begin that this compiler's export writes


def onnx_facts(path: Path) -> GraphFacts:
    """The facts of the file; data beside it is not loaded. Raises InputError when it is no ONNX model."""
    model = read_model(path)
    nodes, reader = Nodes.of(model), TensorReader(path)
    tensors = [reader.read(name, tensor) for name, tensor in nodes.tensors]
    tensors += [reader.read_sparse(name, sparse) for name, sparse in nodes.sparse]
    initialized = {name for name, _ in (*nodes.tensors, *nodes.sparse)}
    metadata = {str(each.key): str(each.value) for each in model.metadata_props}
    return GraphFacts(
        source=str(path),
        form="ONNX file",
        vocabulary="ONNX",
        size=Size(
            nodes.operators.total(),
            nodes.in_subgraphs,
            nodes.in_functions,
            max(0, path.stat().st_size - reader.inside),
            reader.inside + reader.beside,
        ),
        operators=dict(nodes.operators),
        wiring=tuple(nodes.lines),
        tensors=tuple(tensors),
        # Up to version 3 of the format, initializers are inputs as well.
        inputs=tuple(map(_value, (each for each in model.graph.input if str(each.name) not in initialized))),
        outputs=tuple(map(_value, model.graph.output)),
        layers=_layers(metadata),
        properties=dict(_properties(model, metadata)),
        notes=tuple(reader.notes()),
    )


def _value(info: Any) -> Value:
    kind, name = info.type.WhichOneof("value"), str(info.name)
    if kind != "tensor_type":
        return Value(name, TensorType(kind.removesuffix("_type") if kind else None, None))
    tensor = info.type.tensor_type
    shape = tuple(map(_size, tensor.shape.dim)) if tensor.HasField("shape") else None
    return Value(name, TensorType(dtype_name(tensor.elem_type), shape))


def _size(dimension: Any) -> int | str:
    return dimension.dim_value if dimension.HasField("dim_value") else str(dimension.dim_param) or "?"


def _layers(metadata: dict[str, str]) -> tuple[Layer, ...] | None:
    """The layers the metadata tells of, None where another exporter wrote it."""
    if not any(key.startswith(_OURS) for key in metadata):
        return None
    return in_order(
        _layer(key.removeprefix(_LAYER), text) for key, text in metadata.items() if key.startswith(_LAYER)
    )


def _layer(name: str, text: str) -> Layer:
    try:
        return fused_layer(name, parse(text, MoESpec))
    except ValueError:  # of another version, or edited by hand
        return Layer(name, True, text, experts=text)


def _properties(model: Any, metadata: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield "IR version", str(model.ir_version)
    for domain, version in sorted(
        (str(each.domain) or "ai.onnx", each.version) for each in model.opset_import
    ):
        yield f"opset {domain}", str(version)
    yield "producer", f"{model.producer_name} {model.producer_version}".strip()
    yield from ((key, value) for key, value in sorted(metadata.items()) if not key.startswith(_LAYER))
