"""Textual IR one can read and compare: values numbered in order, sizes named in order, parameters by their
names.

    %3 : f32[s0*s1, 64] = view(%x, [s0*s1, 64])
    %4 : f32[s0*s1, 64] = dsmoe.moe(%3, [@layers.0.mlp.gate.weight], …, "moe(top_k=2,…)")

The same program captured twice prints the same bytes: no internal name, symbol or address appears.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dsmoe_compiler.ir.graph import ProgramGraph, module_path

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_WIDTH = 110  # a longer line has one argument a line
_EACH = ",\n    "
_SYMBOL = re.compile(r"\b[su]\d+\b")


def print_graph(graph: ProgramGraph, nodes: Iterable[Node] | None = None, modules: bool = False) -> str:
    """The graph or the given nodes of it, a value a line; `modules` adds comments where modules change."""
    printer = _Printer(graph)
    wanted = None if nodes is None else set(nodes)
    lines, path = [], None
    for node in graph.graph.nodes:
        line = printer.line(node)
        if line is None or (wanted is not None and node not in wanted):
            continue
        if modules and node.op == "call_function" and module_path(node) != path:
            path = module_path(node)
            lines.append(f"# {'.'.join(path)}")
        lines.append(line)
    return "\n".join(lines) + "\n"


@dataclass
class _Printer:
    graph: ProgramGraph
    names: dict[Node, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def line(self, node: Node) -> str | None:
        """The node's line, or None for a parameter, which is printed where it is used."""
        if (parameter := self.graph.parameter(node)) is not None:
            self.names[node] = f"@{parameter}"
            return None
        if node.op == "placeholder":
            self.names[node] = f"%{node.name}"
            return f"{self.names[node]} : {self.type(node.meta.get('val'))} = input"
        if node.op == "output":
            return f"return {self.argument(node.args[0])}"
        self.names[node] = f"%{self.count}"
        self.count += 1
        arguments = [self.argument(a) for a in node.args]
        arguments += [
            f"{k}={self.argument(v)}"
            for k, v in sorted(node.kwargs.items())
            if k not in ("device", "pin_memory")
        ]
        kind = self.type(node.meta.get("val"))
        line = f"{self.names[node]} : {kind} = {_operator(node)}({', '.join(arguments)})"
        if len(line) <= _WIDTH:
            return line
        return f"{self.names[node]} : {kind} = {_operator(node)}(\n    {_EACH.join(arguments)})"

    def argument(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.argument(v) for v in value)}]"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return f'"{value}"' if isinstance(value, str) else str(value)

    def type(self, value: Any) -> str:
        if isinstance(value, Tensor):
            sizes = ", ".join(self.size(s) for s in value.shape)
            name = str(value.dtype).removeprefix("torch.")
            word = name.rstrip("0123456789")
            return f"{_DTYPES.get(word, word)}{name[len(word) :]}[{sizes}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.type(v) for v in value)})"
        if isinstance(value, (int, torch.SymInt)):
            return self.size(value)
        return "none" if value is None else type(value).__name__

    def size(self, size: int | torch.SymInt) -> str:
        """A size with its symbols renamed s0, s1, … in order of appearance, factors in that order."""
        text = str(size)
        for symbol in _SYMBOL.findall(text):
            self.symbols.setdefault(symbol, f"s{len(self.symbols)}")
        renamed = _SYMBOL.sub(lambda m: self.symbols[m.group()], text)
        if re.fullmatch(r"[\w*]+", renamed):
            return "*".join(sorted(renamed.split("*"), key=lambda f: (not f.isdigit(), f)))
        return renamed


def _operator(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, name = schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"
