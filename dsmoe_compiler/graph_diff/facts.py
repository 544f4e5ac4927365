"""What is known of a graph, in whatever form it came: its operators, tensors, layers, inputs and sizes.

Types are spelled as in the textual IR: "f32[4, 96]", sizes that vary by their names. What a form does not say
is None, and is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dsmoe_compiler.graph_diff.content import Content

Vocabulary: TypeAlias = Literal["ATen", "ONNX"]


@dataclass(frozen=True)
class TensorType:
    """A dtype ("f32") and a shape, a size that varies by its name; None where the graph does not say."""

    dtype: str | None
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        dtype = self.dtype or "?"
        return f"{dtype}[…]" if self.shape is None else f"{dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer, constant or initializer.

    `bytes` is what its numbers take, `content` where they are, None where they are nowhere to be had.
    """

    name: str
    type: TensorType
    bytes: int
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Value:
    """An input or an output of the graph."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Layer:
    """An MoE layer: `fused` where it is one op or was exported from one, `text` then its spec's line.

    `router`, `experts` and `shared` are for reading, "" where they are not known or not there.
    """

    name: str
    fused: bool
    text: str = ""
    router: str = ""
    experts: str = ""
    shared: str = ""


@dataclass(frozen=True)
class Size:
    """How large a graph is.

    `nodes` counts operators' applications: `in_subgraphs` of them stand in branches and loop bodies,
    `in_functions` in functions of the model's own, each counted once. `graph_bytes` is the file without its
    tensors (None where there is no file), `data_bytes` what all tensors take, shared memory counted once.
    """

    nodes: int
    in_subgraphs: int
    in_functions: int
    graph_bytes: int | None
    data_bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """One graph.

    `source` is what the user called it, `form` what that is ("ONNX file", "captured graph"), `operators` how
    often each operator is applied, `wiring` a line for each application: operator, operands, attributes; the
    names of computed values are not in it. `layers` is None where nobody knows them. `properties` are a
    file's own words ("opset": "20"), `notes` what the reader of a comparison should know.
    """

    source: str
    form: str
    vocabulary: Vocabulary
    size: Size
    operators: Mapping[str, int]
    wiring: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    layers: tuple[Layer, ...] | None
    properties: Mapping[str, str]
    notes: tuple[str, ...] = ()
