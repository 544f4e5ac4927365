"""Where a program selects: the top-k or argmax ids that choose rows or weights of anything.

Every such place is a layer of the report, understood or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch.fx import Node

from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    ProgramGraph,
    common_module,
    is_tensor,
    same_size,
    shape,
    source,
    value,
)
from dsmoe_compiler.passes.lift.state import Unproven, argument, has_slots, operator_name, uncast_rows

_PICKS = frozenset(
    f"aten::{name}"
    for name in (
        *("index", "index_select", "embedding", "index_add", "index_put", "index_copy", "masked_scatter"),
    )
)
_WRITES = frozenset({"aten::index_put_", "aten::index_add_", "aten::scatter_add", "aten::scatter_add_"})
_PRODUCTS = frozenset({"aten::mul", "aten::mul_", "aten::bmm", "aten::matmul", "aten::einsum"})
_REARRANGES = (
    "aten::t",
    "aten::transpose",
    "aten::permute",
    "aten::unsqueeze",
    "aten::squeeze",
    "aten::slice",
)
_SEVERAL = frozenset(
    f"aten::{name}"
    for name in ("sort", "where", "nonzero_numpy", "unbind", "chunk", "split", "split_with_sizes")
)
# Floating matrices that still say who chose whom.
_MATRICES = frozenset(
    f"aten::{name}"
    for name in (
        *("one_hot", "to", "_to_copy", "t", "transpose", "permute", "unsqueeze", "view", "reshape"),
        *("select", "mul", "sum", "type_as", "expand", "contiguous", "sigmoid", "einsum", "softmax"),
        *("_softmax", "div", "where", "masked_fill", "slice"),
    )
) | {"getitem"}
_JOINS = ("aten::cat", "aten::concat", "aten::stack")
_SELECTORS = frozenset({"aten::topk", "aten::argmax", "aten::max"})


@dataclass(frozen=True)
class Selection:
    """One layer: its name, what selects, where that is first used, the user's line there, and all uses."""

    name: str
    selector: Node
    first_use: Node
    source: str
    uses: tuple[Node, ...]


def find_selections(graph: ProgramGraph) -> list[Selection]:
    """Every selection, in execution order; names are made unique with "#2", "#3".

    Slots that are chosen one by one and joined are one selection: what they select is the same.
    """
    nodes = graph.nodes
    position = {n: i for i, n in enumerate(nodes)}
    flow = _routing_flow(graph)
    found, taken, known = list[Selection](), dict[str, int](), set[frozenset[Node]]()
    for selector in nodes:
        if operator_name(selector) not in _SELECTORS or selector not in flow:
            continue
        uses = [n for n in nx.descendants(flow, selector) if flow.nodes[n].get("selects")]
        if not uses or frozenset(uses) in known:
            continue
        known.add(frozenset(uses))
        name = common_module([selector, *uses])
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        first = min(uses, key=position.__getitem__)
        found.append(Selection(unique, selector, first, source(first, name), tuple(uses)))
    return found


def selectors_of(ids: Node) -> tuple[Node, ...]:
    """The top-k or argmax that a layer's ids are made of; several where slots were chosen one by one."""
    found, seen, stack = list[Node](), set[Node](), [ids]
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if operator_name(node) in _SELECTORS:
            found.append(node)
        elif node.target in CASTS or not is_tensor(node) or not value(node).is_floating_point():
            stack.extend(reversed(node.all_input_nodes))
    return tuple(found)


def require_distinct(ids: Node) -> None:
    """The ids of a token differ: they are the indices of a top-k along them, or there is one. Those of pairs
    that were dropped are -1, which is no expert.

    Raises Unproven.
    """
    if not has_slots(ids) or same_size(shape(ids)[-1], 1):
        return
    picked = uncast_rows(ids)
    while (
        operator_name(picked) == "aten::where" and picked.args[2] == -1 and isinstance(picked.args[1], Node)
    ):
        picked = uncast_rows(picked.args[1])
    top = picked.args[0] if operator_name(picked) == "getitem" else None
    along = isinstance(top, Node) and operator_name(top) == "aten::topk" and picked.args[1] == 1
    if not along or argument(top, "dim") not in (-1, len(shape(picked)) - 1):  # type: ignore[arg-type]
        raise Unproven("R404", "the ids may repeat within a token: they are no top-k")


def selected_from(ids: Node) -> int | None:
    """How many experts the ids choose from: the width of what top-k or argmax looks at along the ids.

    None where anything was done to the chosen indices but moving them.
    """
    while ids.op == "call_function":
        name = operator_name(ids)
        if name in _JOINS:
            widths = {selected_from(part) for part in argument(ids, "tensors")}
            return widths.pop() if len(widths) == 1 else None
        if name == "aten::argmax":
            return _width(ids)
        if name == "getitem":
            selector = ids.all_input_nodes[0]
            chosen = operator_name(selector) in ("aten::topk", "aten::max") and ids.args[1] == 1
            return _width(selector) if chosen else None
        below = ids.args[0]
        if not isinstance(below, Node) or not (ids.target in VIEWS | CASTS | COPIES or name in _REARRANGES):
            return None
        ids = below
    return None


def _width(selector: Node) -> int | None:
    scores, dim = selector.args[0], argument(selector, "dim", -1)
    assert isinstance(scores, Node)
    width = shape(scores)[-1] if dim in (-1, len(shape(scores)) - 1) else None
    return width if isinstance(width, int) else None


def _routing_flow(graph: ProgramGraph) -> nx.DiGraph[Node]:
    """The edges along which chosen ids travel: integers, booleans, and the matrices made of them."""
    flow: nx.DiGraph[Node] = nx.DiGraph()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if operator_name(node) in _SELECTORS:
            flow.add_node(node)
            continue
        for origin in [a for a in node.all_input_nodes if a in flow]:
            if _selects(node, origin, flow):
                flow.add_node(node, selects=True)
                flow.add_edge(origin, node)
            elif _carries(node, origin) or _adds(node, flow):
                flow.add_edge(origin, node)
    return flow


def _adds(node: Node, flow: nx.DiGraph[Node]) -> bool:
    """Matrices of different choices added to each other."""
    if operator_name(node) != "aten::add" or not is_tensor(node):
        return False
    return sum(a in flow or len(shape(a)) == 0 for a in node.all_input_nodes if is_tensor(a)) >= 2


def _carries(node: Node, origin: Node) -> bool:
    if operator_name(origin) in ("aten::topk", "aten::max"):
        return bool(node.args[1] == 1)
    if not is_tensor(node):
        return operator_name(node) in _SEVERAL
    if not value(node).is_floating_point():
        return True
    if operator_name(node) in ("aten::scatter", "aten::scatter_"):
        return node.args[2] is origin
    return operator_name(node) in _MATRICES


def _selects(node: Node, origin: Node, flow: nx.DiGraph[Node]) -> bool:
    """Whether routing from `origin` chooses rows or weights here: the other operand has rows to choose."""
    name = operator_name(node)
    if not is_tensor(node) or not value(node).is_floating_point():
        return False
    if name in _PICKS | _WRITES:
        table = node.args[0]
        return isinstance(table, Node) and table is not origin and len(shape(table)) >= 2
    if name in _PRODUCTS:
        others = [a for a in node.all_input_nodes if a is not origin and is_tensor(a)]
        rows = [o for o in others if len(shape(o)) > 1 and not _is_column(o) and o not in flow]
        weighs = _is_column(origin) and bool(rows)
        return weighs or any(len(shape(o)) >= 3 and not same_widths(o, origin) for o in others)
    return name == "aten::where" and node.args[0] is origin and _is_column(origin) and not _is_column(node)


def _is_column(node: Node) -> bool:
    return len(shape(node)) > 1 and same_size(shape(node)[-1], 1)


def same_widths(a: Node, b: Node) -> bool:
    """Whether two values have last dimensions of one size (routing matrices beside each other)."""
    return str(shape(a)[-1:]) == str(shape(b)[-1:]) and len(shape(a)) == len(shape(b))
