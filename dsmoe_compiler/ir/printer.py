"""Textual IR one can read and compare: values numbered in order, sizes named in order, parameters by their
names.

    %3 : f32[s0*s1, 64] = view(%x, [s0*s1, 64])
    %4 : f32[s0*s1, 64] = dsmoe.moe(%3,
        router=[@layers.0.mlp.gate.weight],
        …
        spec=moe(top_k=2, …))

The same program captured twice prints the same bytes: no internal name, symbol or address appears.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import ProgramGraph, is_tensor, module_path, shape
from dsmoe_compiler.ir.name_lists import fold_names
from dsmoe_compiler.ir.spec_lines import STEP, spec_lines
from dsmoe_compiler.ir.type_names import TypeNames

WIDTH = 110  # a longer line has one argument a line
_UNSAID = ("device", "pin_memory")
_SCALARS = (int, float, torch.SymInt, torch.SymBool, torch.SymFloat)


def print_graph(graph: ProgramGraph, nodes: Iterable[Node] | None = None, modules: bool = False) -> str:
    """The graph or the given nodes of it, a value a line; `modules` adds comments where modules change."""
    printer = _Printer(graph)
    wanted = None if nodes is None else set(nodes)
    lines, path = [], None
    for node in graph.graph.nodes:
        line = printer.line(node)
        if line is None or (wanted is not None and node not in wanted):
            continue
        if modules and node.op == "call_function" and (at := _module(graph, node, path)) not in (path, None):
            path = at
            lines.append(f"# {path or '(model)'}")
        lines.append(line)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class LayerNodes:
    """One layer of a graph: its `name`, the values it reads from outside, tokens first, its own values in
    execution order, and those of them that are read outside.
    """

    name: str
    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    results: tuple[Node, ...]


@dataclass(frozen=True)
class LayerText:
    """A printed layer: its text, and for each value in it how it is called, what type it has, and its line.

    `parameters` gives the name and the type of every parameter that the layer reads.
    """

    text: str
    names: Mapping[Node, str]
    types: Mapping[Node, str]
    lines: Mapping[Node, str]
    parameters: Mapping[Node, tuple[str, str]]


def print_layer(graph: ProgramGraph, layer: LayerNodes) -> str:
    """One layer alone: its inputs with their types, its values numbered from 0, its results.

    Sizes stand where they are used; T is the number of tokens; a parameter's name begins with a dot where the
    layer's own name is left out; assertions are counted, not shown. So layers that are alike print alike.
    """
    return layer_text(graph, layer).text


def layer_text(graph: ProgramGraph, layer: LayerNodes) -> LayerText:
    """What `print_layer` prints, piece by piece."""
    tokens = layer.inputs[0] if layer.inputs else None
    named = is_tensor(tokens) and len(shape(tokens)) > 1 if tokens is not None else False
    printer = _Printer(graph, prefix=layer.name, inline_sizes=True)
    for given in graph.user_inputs():
        printer.types.type(given.meta.get("val"))  # symbols are numbered as in the whole program's text
    if tokens is not None and named:
        count: Any = 1
        for size in shape(tokens)[:-1]:
            count = count * size
        printer.types.tokens = count if isinstance(count, torch.SymInt) else None
    return printer.layer(layer)


def is_assertion(node: Node) -> bool:
    """Whether a node only checks: it has no value."""
    return node.op == "call_function" and node.meta.get("val") is None and not node.users


def is_scalar(node: Node) -> bool:
    """Whether a node's value is a size or what is computed of sizes, not a tensor."""
    return isinstance(node.meta.get("val"), _SCALARS)


@dataclass
class _Printer:
    graph: ProgramGraph
    prefix: str = ""
    inline_sizes: bool = False
    names: dict[Node, str] = field(default_factory=dict)
    types: TypeNames = field(default_factory=TypeNames)
    count: int = 0

    def layer(self, layer: LayerNodes) -> LayerText:
        head = f"# layer {layer.name}" if layer.name else "# the whole model"
        if self.types.tokens is not None:
            head += f", T = {self.types.definition} tokens"
        lines, types = dict[Node, str](), dict[Node, str]()
        for i, node in enumerate(n for n in layer.inputs if not is_scalar(n)):
            self.names[node] = f"%x{i or ''}"
            types[node] = self.types.type(node.meta.get("val"))
            lines[node] = f"{self.names[node]} : {types[node]} = input"
        for node in (n for n in layer.nodes if not is_assertion(n) and not is_scalar(n)):
            if (line := self.line(node)) is not None:
                lines[node], types[node] = line, self.types.type(node.meta.get("val"))
        assertions = sum(map(is_assertion, layer.nodes))
        unsaid = [f"# {assertions} assertion{'s' * (assertions > 1)} not shown"] if assertions else []
        results = f"return {', '.join(self.argument(r) for r in layer.results)}"
        text = "\n".join([head, *lines.values(), *unsaid, results]) + "\n"
        read = {a: self.graph.parameter(a) for n in layer.nodes for a in n.all_input_nodes}
        parameters = {
            a: (self._parameter(p), self.types.type(a.meta.get("val"))) for a, p in read.items() if p
        }
        return LayerText(text, self.names, types, lines, parameters)

    def line(self, node: Node) -> str | None:
        """The node's line, or None for a parameter, which is printed where it is used."""
        if (parameter := self.graph.parameter(node)) is not None:
            self.names[node] = self._parameter(parameter)
            return None
        if node.op == "placeholder":
            self.names[node] = f"%{node.name}"
            return f"{self.names[node]} : {self.types.type(node.meta.get('val'))} = input"
        if node.op == "output":
            return f"return {self.argument(node.args[0])}"
        self.names[node] = f"%{self.count}"
        self.count += 1
        return self._call(f"{self.names[node]} : {self.types.type(node.meta.get('val'))} = ", node)

    def _call(self, lead: str, node: Node) -> str:
        if operator_text(node).startswith("dsmoe."):
            return self._own(lead, node)
        arguments = [self.argument(a) for a in node.args]
        arguments += [f"{k}={self.argument(v)}" for k, v in sorted(node.kwargs.items()) if k not in _UNSAID]
        line = f"{lead}{operator_text(node)}({', '.join(arguments)})"
        if len(line) <= WIDTH:
            return line
        pieces = [p for a in (*node.args, *node.kwargs.values()) for p in self._wrapped(a, "")]
        return f"{lead}{operator_text(node)}(\n" + _indented(pieces) + ")"

    def _own(self, lead: str, node: Node) -> str:
        """One of this compiler's operators: its lists by name, its spec over several lines; empty lists are
        not said.
        """
        schema = getattr(node.target, "_schema", None)
        formals = [a.name for a in schema.arguments] if schema is not None else []
        given = list(zip(formals, node.args, strict=False))
        plain = [self.argument(a) for _, a in given if not isinstance(a, (list, tuple, str))]
        pieces = list[str]()
        for name, value in given:
            if isinstance(value, str) and name == "spec":
                first, *others = spec_lines(value, WIDTH - STEP - len("spec=,"))
                pieces.append("\n".join([f"spec={first}", *others]))
            elif isinstance(value, (list, tuple)) and value:
                pieces += self._wrapped(value, f"{name}=")
        opening = f"{lead}{operator_text(node)}({', '.join(plain)}"
        if len(one := f"{opening}{', ' if plain else ''}{', '.join(pieces)})") <= WIDTH and "\n" not in one:
            return one
        return f"{opening}{',' if plain else ''}\n{_indented(pieces)})"

    def _wrapped(self, value: Any, label: str) -> list[str]:
        """An argument as one piece, a long list over several lines."""
        if not isinstance(value, (list, tuple)):
            return [f"{label}{self.argument(value)}"]
        lines, indent = [f"{label}["], " " * (len(label) + 1)
        items = self._items(value)
        for i, item in enumerate(items):
            item += "," if i + 1 < len(items) else "]"
            room = len(lines[-1]) + len(item) + 1 <= WIDTH - STEP
            if lines[-1].endswith("[") or room:
                lines[-1] += item if lines[-1].endswith("[") else f" {item}"
            else:
                lines.append(indent + item)
        return ["\n".join(lines) + ("" if items else "]")]

    def argument(self, value: Any) -> str:
        if isinstance(value, Node):
            if self.inline_sizes and is_scalar(value):
                return self.types.size(value.meta["val"])
            if (parameter := self.graph.parameter(value)) is not None:
                return self._parameter(parameter)
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._items(value))}]"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, int) and not isinstance(value, bool):
            return self.types.size(value)
        return f'"{value}"' if isinstance(value, str) else str(value)

    def _items(self, values: Sequence[Any]) -> list[str]:
        parameters = [self.graph.parameter(v) for v in values]
        if all(p is not None for p in parameters):
            return fold_names([self._parameter(p) for p in parameters if p is not None])
        return [self.argument(v) for v in values]

    def _parameter(self, name: str) -> str:
        own = self.prefix and name.startswith(f"{self.prefix}.")
        return f"@{name.removeprefix(self.prefix)}" if own else f"@{name}"


def _indented(pieces: Sequence[str]) -> str:
    """Each piece on lines of its own, one step in."""
    lines = ",\n".join(pieces).split("\n")
    return "\n".join(" " * STEP + line for line in lines)


def _module(graph: ProgramGraph, node: Node, current: str | None) -> str | None:
    """The module a value was made in; its parent where a parameter in the line says the rest, None where
    nobody knows.
    """
    path = module_path(node)
    if path and path[0].startswith("_"):
        return None
    said = {(graph.parameter(a) or "").rpartition(".")[0] for a in node.all_input_nodes}
    whole = ".".join(path)
    return ".".join(path[:-1]) if whole in said and whole != current else whole


def operator_text(node: Node) -> str:
    """ "topk", "dsmoe.moe": an operator's name as the text says it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, name = schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"
