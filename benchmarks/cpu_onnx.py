"""The same layer in onnxruntime, float32: its own `com.microsoft::MoE`, and standard operators alone.

The standard form sorts the pairs by expert, splits their rows by the experts' counts and multiplies each part
by its expert's matrix, stored as MatMul wants it, which onnxruntime packs when the session begins.

T tokens, D model width, F expert hidden width, E routed experts, K experts per token, P = T·K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.cpu_shapes import Shape, expert_weights

INSTALLED = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
Array = NDArray[Any]
_OPSET, _IR = 20, 10


class _Graph:
    """Nodes in the order they are added, and arrays: small ones in the file's format, weights beside it."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.small: list[Any] = []
        self.weights: dict[str, Array] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """The names of the node's outputs."""
        from onnx import helper

        names = [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names

    def one(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The name of the node's only output."""
        return self.op(kind, *inputs, domain=domain, **attributes)[0]

    def integers(self, *values: int) -> str:
        """A vector."""
        from onnx import numpy_helper

        name = f"i{len(self.small)}"
        self.small.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def weight(self, array: Array) -> str:
        """An array too large for the format."""
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def swiglu(self, gate: str, up: str) -> str:
        """silu(gate) · up."""
        return self.one("Mul", self.one("Mul", gate, self.one("Sigmoid", gate)), up)


def contrib_moe(layer: nn.Module, shape: Shape, threads: int) -> Callable[[Tensor], Tensor]:
    """onnxruntime's own operator for the routed experts."""
    g, gate_up, down = _Graph(), *(w.numpy() for w in expert_weights(layer))
    e, f, d = shape.experts, shape.hidden, shape.width
    # It wants gate and up in alternate rows.
    alternate = gate_up.reshape(e, 2, f, d).swapaxes(1, 2).reshape(e, 2 * f, d)
    logits = _logits(g, layer)
    # Unnormalised weights come out as zeros in some graphs, so they are normalised and multiplied again.
    out = g.one(
        "MoE",
        *("x", logits, g.weight(alternate), "", g.weight(down)),
        domain="com.microsoft",
        k=shape.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    if shape.shared:  # the zoo's layer does not normalise
        weights, _ = _chosen(g, logits, shape)
        out = g.one("Mul", out, g.one("ReduceSum", weights, g.integers(1), keepdims=1))
    return _session(g, _with_shared(g, layer, shape, out), threads)


def split_form(layer: nn.Module, shape: Shape, threads: int) -> Callable[[Tensor], Tensor]:
    """Standard operators, two MatMuls an expert."""
    g, (gate_up, down) = _Graph(), expert_weights(layer)
    k, d = shape.top_k, shape.width
    weights, ids = _chosen(g, _logits(g, layer), shape)
    if not shape.shared:  # transformers' block normalises
        weights = g.one("Div", weights, g.one("ReduceSum", weights, g.integers(1), keepdims=1))
    flat = g.one("Reshape", ids, g.integers(-1))
    pairs = g.one("Shape", flat)
    _, order = g.op("TopK", flat, pairs, outputs=2, axis=0, largest=0, sorted=1)
    rows = g.one("Gather", "x", g.one("Div", order, g.integers(k)), axis=0)
    chosen = g.one("Equal", g.one("Unsqueeze", flat, g.integers(1)), g.integers(*range(shape.experts)))
    counts = g.one("ReduceSum", g.one("Cast", chosen, to=7), g.integers(0), keepdims=0)
    h = _grouped(g, rows, counts, gate_up)
    gate, up = g.op("Split", h, outputs=2, axis=1, num_outputs=2)
    y = _grouped(g, g.swiglu(gate, up), counts, down)
    zero, one = (g.one("Squeeze", g.integers(i)) for i in (0, 1))
    places = g.one("Range", zero, g.one("Squeeze", pairs), one)
    back = g.one("ScatterElements", order, order, places, axis=0)
    y = g.one("Reshape", g.one("Gather", y, back, axis=0), g.integers(-1, k, d))
    weighted = g.one("Mul", y, g.one("Unsqueeze", weights, g.integers(2)))
    out = g.one("ReduceSum", weighted, g.integers(1), keepdims=0)
    return _session(g, _with_shared(g, layer, shape, out), threads)


def _logits(g: _Graph, layer: nn.Module) -> str:
    return g.one("MatMul", "x", _transposed(g, layer.get_parameter("gate.weight")))


def _chosen(g: _Graph, logits: str, shape: Shape) -> list[str]:
    """Weights and ids of the K best scores."""
    scores = g.one("Softmax", logits, axis=-1)
    return g.op("TopK", scores, g.integers(shape.top_k), outputs=2, axis=-1)


def _grouped(g: _Graph, rows: str, counts: str, weight: Tensor) -> str:
    parts = g.op("Split", rows, counts, outputs=len(weight), axis=0)
    products = [g.one("MatMul", part, _transposed(g, w)) for part, w in zip(parts, weight, strict=True)]
    return g.one("Concat", *products, axis=0)


def _with_shared(g: _Graph, layer: nn.Module, shape: Shape, routed: str) -> str:
    if not shape.shared:
        return routed
    gate, up, down = (
        _transposed(g, layer.get_parameter(f"shared_experts.{name}_proj.weight"))
        for name in ("gate", "up", "down")
    )
    hidden = g.swiglu(g.one("MatMul", "x", gate), g.one("MatMul", "x", up))
    return g.one("Add", routed, g.one("MatMul", hidden, down))


def _transposed(g: _Graph, weight: Tensor) -> str:
    return g.weight(weight.t().contiguous().numpy())


def _session(g: _Graph, out: str, threads: int) -> Callable[[Tensor], Tensor]:
    """(1, T, D) to (T, D). The weights are copied into the session, which packs them."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    rows = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", None]) for n in ("x", out)]
    beside = [_external(name, array) for name, array in g.weights.items()]
    graph = helper.make_graph(g.nodes, "layer", rows[:1], rows[1:], [*g.small, *beside])
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads would go on spinning while the next way is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in g.weights.values()]
    options.add_external_initializers(list(g.weights), values)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.flatten(0, 1).numpy()})[0])

    return run


def _external(name: str, array: Array) -> Any:
    """An array that the session is given beside the model: the format holds two gigabytes at most."""
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given")
    return tensor
