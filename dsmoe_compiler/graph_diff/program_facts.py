"""What is known of a graph that torch captured, before its passes, after them, or compiled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Size, Tensor, TensorType, Value
from dsmoe_compiler.graph_diff.layers import fused_layer, in_order
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.printer import operator_text, print_graph
from dsmoe_compiler.ir.type_names import TypeNames, dtype_name
from dsmoe_compiler.report.report import LayerReport
from dsmoe_compiler.storages import memory, plain


@dataclass(frozen=True, eq=False)
class TorchContent:
    """The bytes of a torch tensor."""

    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchContent) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    @property
    def available(self) -> bool:
        return plain(self.tensor)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    @cached_property
    def _memory(self) -> memoryview:
        return memory(self._whole)

    @cached_property
    def _whole(self) -> torch.Tensor:
        return self.tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self._memory[start:stop])


def program_facts(
    source: str, form: str, graph: ProgramGraph, layers: Iterable[Layer] = (), file_bytes: int | None = None
) -> GraphFacts:
    """The facts of a graph as it is now. `file_bytes` is what the file it was read from has."""
    tensors = _tensors(graph)
    data = _bytes_of(t for _, t in tensors)
    inside, subgraphs = _applications(graph)
    types = TypeNames()
    return GraphFacts(
        source=source,
        form=form,
        vocabulary="ATen",
        size=Size(
            len(inside) + len(subgraphs),
            len(subgraphs),
            0,
            None if file_bytes is None else max(0, file_bytes - data),
            data,
        ),
        operators=dict(Counter(map(operator_text, [*inside, *subgraphs]))),
        wiring=(*print_graph(graph).splitlines(), *(node.format_node() or "" for node in subgraphs)),
        tensors=tuple(
            Tensor(name, TensorType(dtype_name(t.dtype), tuple(t.shape)), t.nbytes, TorchContent(t))
            for name, t in tensors
        ),
        inputs=tuple(Value(n.name, _type(n.meta.get("val"), types)) for n in graph.user_inputs()),
        outputs=tuple(_outputs(graph, types)),
        layers=in_order(layers),
        properties={},
    )


def as_written(layers: Iterable[LayerReport]) -> Iterator[Layer]:
    """The layers before any pass."""
    return (Layer(layer.name, False) for layer in layers)


def as_reported(layers: Iterable[LayerReport]) -> Iterator[Layer]:
    """The layers as the passes left them."""
    return (
        fused_layer(layer.name, layer.spec) if layer.fused and layer.spec else Layer(layer.name, False)
        for layer in layers
    )


def _applications(graph: ProgramGraph) -> tuple[list[Node], list[Node]]:
    """The nodes that compute: the graph's own, and those of graphs in it (the branches of a `cond`)."""
    own, inner = list[Node](), list[Node]()
    root = graph.exported.graph_module
    for module in root.modules():
        if isinstance(module, GraphModule):
            found = own if module is root else inner
            found += (node for node in module.graph.nodes if node.op.startswith("call_"))
    return own, inner


def _tensors(graph: ProgramGraph) -> list[tuple[str, torch.Tensor]]:
    """The tensors that the graph takes beside its inputs, by their dotted names."""
    named = ((graph.parameter(node), node) for node in graph.nodes)
    return [(name, graph.tensor(node)) for name, node in named if name is not None]


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What they take together; memory that several look at is counted once."""
    spans = defaultdict[int, list[tuple[int, int]]](list)
    for t in tensors:
        if t.layout is not torch.strided:
            spans[-1].append((end := sum(b - a for a, b in spans[-1]), end + t.nbytes))
        elif t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            start = int(t.storage_offset()) * t.itemsize
            spans[t.untyped_storage()._cdata].append((start, start + (int(last) + 1) * t.itemsize))
    return sum(map(_union, spans.values()))


def _union(spans: Sequence[tuple[int, int]]) -> int:
    covered, end = 0, 0
    for low, high in sorted(spans):
        covered += max(0, high - max(low, end))
        end = max(end, high)
    return covered


def _outputs(graph: ProgramGraph, types: TypeNames) -> Iterator[Value]:
    """By their places: names of results are the tracer's own."""
    (results,) = graph.graph.output_node().args
    assert isinstance(results, tuple)
    for i, result in enumerate(results):
        value = result.meta.get("val") if isinstance(result, Node) else result
        yield Value(f"output {i}", _type(value, types))


def _type(value: Any, types: TypeNames) -> TensorType:
    if not isinstance(value, torch.Tensor):
        return TensorType(types.type(value), ())
    sizes = (types.size(size) for size in value.shape)
    shape = tuple(int(size) if size.isdecimal() else size for size in sizes)
    return TensorType(dtype_name(value.dtype), shape)
