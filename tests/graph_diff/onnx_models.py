"""Small ONNX models, made by hand: a stack of matrices, and what one can put around it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

WIDTH = 8


def matrix(name: str, seed: int = 0) -> Any:
    """A WIDTH × WIDTH float32 initializer."""
    numbers = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype("float32")
    return numpy_helper.from_array(numbers, name)


def value(name: str, *sizes: int | str) -> Any:
    """A float32 value of the graph."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(sizes))


def model(
    nodes: Sequence[Any],
    initializers: Sequence[Any] = (),
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    functions: Sequence[Any] = (),
) -> Any:
    """A model from `x` to `y`, each (batch, WIDTH) unless said otherwise."""
    given = [value("x", "batch", WIDTH)] if inputs is None else inputs
    results = [value("y", "batch", WIDTH)] if outputs is None else outputs
    graph = helper.make_graph(nodes, "graph", given, results, initializers)
    domains = [helper.make_opsetid("", 20), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    made = helper.make_model(graph, opset_imports=domains, ir_version=10, functions=functions)
    helper.set_model_props(made, dict(metadata or {}))
    return made


def stack(seeds: Sequence[int] = (0, 1), activation: str = "Relu", **rest: Any) -> Any:
    """`x` times a matrix, then the activation, once for each seed."""
    nodes, at = [], "x"
    for i in range(len(seeds)):
        end = "y" if i + 1 == len(seeds) else f"x{i}"
        nodes += [
            helper.make_node("MatMul", [at, f"layers.{i}.weight"], [f"h{i}"], name=f"matmul_{i}"),
            helper.make_node(activation, [f"h{i}"], [end]),
        ]
        at = end
    return model(nodes, [matrix(f"layers.{i}.weight", seed) for i, seed in enumerate(seeds)], **rest)


def written(made: Any, path: Path, beside: str | None = None) -> Path:
    """The path, where the model now is; its data in the file named `beside`, if any."""
    if beside is None:
        save(made, path)
    else:
        save(made, path, save_as_external_data=True, location=beside, size_threshold=0)
    return path


def branches(then: Any, otherwise: Any, name: str = "choose") -> Any:
    """y = `then` or `otherwise` of x, by whether the input `sure` is true; each a graph from nothing to z."""
    return helper.make_node("If", ["sure"], ["y"], name=name, then_branch=then, else_branch=otherwise)


def branch(operator: str, initializers: Sequence[Any] = (), inner: Sequence[Any] = ()) -> Any:
    """A branch whose last node applies the operator to `x`."""
    last = helper.make_node(operator, ["x"], ["z"])
    return helper.make_graph([*inner, last], "branch", [], [value("z", "batch", WIDTH)], initializers)


def sure() -> Any:
    """The input that an `If` asks."""
    return helper.make_tensor_value_info("sure", TensorProto.BOOL, [])
