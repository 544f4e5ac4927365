"""The nodes of an ONNX model, those of branches, loop bodies and functions included.

A value that is computed goes by its number, so that two models that compute the same in the same order say
the same, however their values are called:

    %3 = Gemm(%x, @w, @b) {transB=1}

Names that are no UTF-8 come from protobuf as bytes: they are told as Python writes these.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TypeAlias

from dsmoe_compiler.graph_diff.onnx_tensors import inline_content, tensor_type

_STEP = "    "
_EXTERNAL = 1  # TensorProto.EXTERNAL
Names: TypeAlias = ChainMap[str, str]  # how each value is called; an inner graph sees those around it


@dataclass
class Nodes:
    """What a walk over a model finds.

    `tensors` are the initializers of all graphs, those of inner ones by the path to them, and tensors among
    the attributes whose data lies beside the model; `sparse` the sparse ones.
    """

    operators: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    tensors: list[tuple[str, Any]] = field(default_factory=list)
    sparse: list[tuple[str, Any]] = field(default_factory=list)
    in_subgraphs: int = 0
    in_functions: int = 0
    _numbered: int = 0

    @staticmethod
    def of(model: Any) -> Nodes:
        """Walk over a ModelProto."""
        found = Nodes()
        found._graph(model.graph, ChainMap(), "", 0)
        for function in sorted(model.functions, key=_function_key):
            before = found.operators.total()
            formals = ", ".join(map(str, (*function.input, *function.attribute)))
            found.lines.append(f"function {_qualified(function.domain, function.name)}({formals})")
            names = ChainMap({name: f"%{name}" for name in function.input})
            found._nodes(function.node, names, f"{function.name}/", 1)
            found._yield(function.output, names, 1)
            found.in_functions += found.operators.total() - before
        return found

    def _graph(self, graph: Any, outer: Names, path: str, depth: int) -> None:
        names = outer.new_child({value.name: f"%{value.name}" for value in graph.input})
        for tensor in graph.initializer:
            self.tensors.append((f"{path}{tensor.name}", tensor))
            names[tensor.name] = f"@{tensor.name}"
        for sparse in graph.sparse_initializer:
            self.sparse.append((f"{path}{sparse.values.name}", sparse))
            names[sparse.values.name] = f"@{sparse.values.name}"
        self._nodes(graph.node, names, path, depth)
        self._yield((value.name for value in graph.output), names, depth)

    def _nodes(self, nodes: Iterable[Any], names: Names, path: str, depth: int) -> None:
        for node in nodes:
            operator = _qualified(node.domain, node.op_type) + (f":{node.overload}" if node.overload else "")
            self.operators[operator] += 1
            operands = ", ".join(names.get(name, f"%{name}") if name else "_" for name in node.input)
            results = {name: f"%{self._numbered + i}" for i, name in enumerate(filter(None, node.output))}
            self._numbered += len(results)
            attributes = sorted(node.attribute, key=lambda each: str(each.name))
            said = ", ".join(f"{a.name}={_attribute(a)}" for a in attributes)
            told = f"{_STEP * depth}{', '.join(results.values())} = {operator}({operands})"
            self.lines.append(f"{told} {{{said}}}" if said else told)
            for attribute in attributes:
                self._inner(node, attribute, names, path, depth)
            # Now, not before: what a body reads under this name is the outer value of it.
            names.update(results)

    def _inner(self, node: Any, attribute: Any, names: Names, path: str, depth: int) -> None:
        """Graphs among a node's attributes, and tensors whose data lies elsewhere."""
        inside = f"{path}{node.name or ','.join(map(str, node.output))}"
        for tensor in filter(_is_external, (attribute.t, *attribute.tensors)):
            self.tensors.append((inside, tensor))
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            before = self.operators.total() if depth == 0 else 0
            self.lines.append(f"{_STEP * (depth + 1)}{attribute.name}:")
            self._graph(graph, names, f"{inside}/{attribute.name}/", depth + 1)
            if depth == 0:  # those deeper are counted with it
                self.in_subgraphs += self.operators.total() - before

    def _yield(self, results: Iterable[str], names: Names, depth: int) -> None:
        told = ", ".join(names.get(name, f"%{name}") for name in results)
        self.lines.append(f"{_STEP * depth}return {told}")


def _function_key(function: Any) -> tuple[str, str, str]:
    return str(function.domain), str(function.name), str(function.overload)


def _qualified(domain: str, name: str) -> str:
    return str(name) if domain in ("", "ai.onnx") else f"{domain}::{name}"


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == _EXTERNAL)


def _attribute(attribute: Any) -> str:
    """An attribute's value as text; tensors by their type and the digest of their numbers."""
    if attribute.ref_attr_name:
        return f"&{attribute.ref_attr_name}"
    if attribute.HasField("g") or attribute.graphs:
        return "graph"
    single = [name for name in ("f", "i", "s", "t", "sparse_tensor", "tp") if attribute.HasField(name)]
    if single:
        return _value(getattr(attribute, single[0]))
    return f"[{', '.join(_values(attribute))}]"


def _values(attribute: Any) -> Iterator[str]:
    for name in ("floats", "ints", "strings", "tensors", "sparse_tensors", "type_protos"):
        yield from map(_value, getattr(attribute, name))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, bytes):
        return repr(value.decode(errors="backslashreplace"))
    if hasattr(value, "raw_data") and not _is_external(value):
        content = inline_content(value)
        return f"{tensor_type(value)}#{_digest(content.data if content else value.SerializeToString())}"
    return f"#{_digest(value.SerializeToString(deterministic=True))}"


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:12]
