"""Reading a subgraph backwards: chains of operators and the maths between two values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from dsmoe_compiler.ir.body import Body, Step, Terms
from dsmoe_compiler.ir.graph import (
    COPIES,
    VIEWS,
    ProgramGraph,
    alias_root,
    is_tensor,
    mutated_argument,
    same_size,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.rowwise import BINARY, UNARY
from dsmoe_compiler.passes.lift.state import argument, operator_name, row_base

RESHAPES = VIEWS | COPIES


def same_rows(a: Node, b: Node) -> bool:
    """Whether two values are views of one value that keep its rows: equal last dimension, equal order."""
    return row_base(a) is row_base(b) and same_size(shape(a)[-1], shape(b)[-1])


def first_overwritten(graph: ProgramGraph, x: Node, results: Iterable[Node]) -> Node | None:
    """A value from x to the results that is overwritten in place: read later, it would differ."""
    written = {alias_root(m) for n in graph.nodes if (m := mutated_argument(n)) is not None}
    stack, seen = list(results) if written else [], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_tensor(node) and alias_root(node) in written:
            return node
        if not is_tensor(node) or row_base(node) is not row_base(x):
            stack.extend(node.all_input_nodes)
    return None


def size_arguments(graph: ProgramGraph, of: Node) -> list[int | Node] | None:
    """A reshape's arguments for the node's sizes: numbers, earlier values, at most one −1; else None."""
    known: dict[object, Node] = {}
    for node in graph.nodes:
        if node is of:
            break
        if isinstance(node.meta.get("val"), torch.SymInt):
            known.setdefault(value(node).node.expr, node)
    sizes = [s if isinstance(s, int) else known.get(s.node.expr, -1) for s in shape(of)]
    return sizes if sizes.count(-1) <= 1 else None


def row_body(graph: ProgramGraph, result: Node, x: Node) -> tuple[Body, list[Node]] | None:
    """`result` as a body over rows of `x` and whole parameters in order of appearance, or None."""
    reader = _Reader(graph, x)
    term = reader.read(result)
    if term is None or not reader.found_x:
        return None
    params = [s for s in (reader.terms.steps[t] for t in reader.terms.reachable(term)) if s.op == "expert"]
    rename = {s: Step("p", (), (i,)) for i, s in enumerate(params)} | {Step("token", (), ("x",)): Step("x")}
    return reader.terms.body(term, rename), [reader.params[str(s.attrs[0])] for s in params]


def _as_many_rows(operand: Node, node: Node) -> bool:
    """Whether an operand has all of the result's rows, none broadcast."""
    sizes, own = shape(node), shape(operand)
    return len(own) == len(sizes) and all(map(same_size, own[:-1], sizes[:-1]))


class _Reader:
    """Reads a value as a term: x is the only row leaf, parameters the only others."""

    def __init__(self, graph: ProgramGraph, x: Node) -> None:
        self.graph, self.x = graph, x
        self.terms, self.params = Terms(), dict[str, Node]()
        self.found_x = False
        self._known: dict[Node, int | None] = {}

    def read(self, node: Node) -> int | None:
        """The node's term, or None where it is not row-wise in x."""
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: Node) -> int | None:
        if not is_tensor(node) or not value(node).is_floating_point():
            return None
        if same_rows(node, self.x):
            self.found_x = True
            return self.terms.number("token", (), ("x",))
        if node.op != "call_function":
            return None
        name = operator_name(node)
        if name == "aten::linear":
            return self._linear(node)
        if name in UNARY:
            return self._unary(node, UNARY[name])
        if name == "aten::gelu":
            return self._unary(node, "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu")
        if name in ("aten::to", "aten::_to_copy"):
            return self._unary(node, "cast", str(value(node).dtype).removeprefix("torch."))
        if name in BINARY and argument(node, "alpha", 1) == 1 and not argument(node, "rounding_mode"):
            return self._binary(node, BINARY[name])
        if name in ("aten::slice", "getitem"):
            return self._slice(node)
        if node.target in RESHAPES and same_rows(node, self._argument(node)):
            return self.read(self._argument(node))
        return None

    def _argument(self, node: Node) -> Node:
        below = node.args[0]
        assert isinstance(below, Node)
        return below

    def _unary(self, node: Node, op: str, *attrs: str) -> int | None:
        row = self.read(self._argument(node))
        return None if row is None else self.terms.number(op, (row,), attrs)

    def _binary(self, node: Node, op: str) -> int | None:
        operands = list[int | None]()
        for a in node.args[:2]:
            if isinstance(a, (int, float)):
                operands.append(self.terms.number("const", (), (a,)))
            elif isinstance(a, Node) and is_tensor(a) and _as_many_rows(a, node):
                operands.append(self.read(a))
            else:
                return None
        left, right = operands
        return None if left is None or right is None else self.terms.number(op, (left, right))

    def _linear(self, node: Node) -> int | None:
        row = self.read(self._argument(node))
        weight, bias = node.args[1], argument(node, "bias")
        tensors = [self._parameter(t) for t in (weight, bias) if t is not None]
        if row is None or any(t is None for t in tensors):
            return None
        product = self.terms.number("linear", (row, tensors[0]))  # type: ignore[arg-type]
        return product if len(tensors) == 1 else self.terms.number("add", (product, tensors[1]))  # type: ignore[arg-type]

    def _parameter(self, node: object) -> int | None:
        if not isinstance(node, Node) or self.graph.parameter(node) is None:
            return None
        self.params[node.name] = node
        return self.terms.number("expert", (), (node.name,))

    def _slice(self, node: Node) -> int | None:
        """slice on the width, or one part of a chunk or split of it."""
        cut = self._argument(node)
        if operator_name(node) == "getitem":
            if operator_name(cut) not in ("aten::chunk", "aten::split", "aten::split_with_sizes"):
                return None
            source, index = self._argument(cut), node.args[1]
            widths = [part.shape[-1] for part in value(cut)]
            assert isinstance(index, int)
            start, stop, step = sum(widths[:index]), sum(widths[: index + 1]), 1
            dim = argument(cut, "dim")
        else:
            source, dim = cut, argument(node, "dim")
            width = shape(source)[-1]
            start, stop, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
            stop = width if stop is None else stop
            if not all(isinstance(s, int) for s in (width, start, stop, step)):
                return None
            stop = min(stop, width)
        row = self.read(source)
        if row is None or dim % len(shape(source)) != len(shape(source)) - 1 or start < 0 or stop < 0:
            return None
        return self.terms.number("slice", (row,), (start, stop, step))
