"""Which numbers ids can hold: what an index counts from the end, and what lies past the last expert.

topk(scores (T, E), K)[1]      0 … E-1
ids % n, ids.clamp(0, n - 1)   0 … n-1
where(own, ids - 4, -1)        -4 … E-5, and -1
ids.masked_fill(ids == E-1, 0) 0 … E-2
table[ids]                     what the table holds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import CASTS, COPIES, VIEWS, ProgramGraph, dtype, is_tensor, shape, value
from dsmoe_compiler.passes.lift.state import Unproven, argument, operator_name

# The least and the largest number; None where there may be any.
Bounds: TypeAlias = tuple[int | None, int | None]

_ANY: Bounds = (None, None)
_CHOOSE = frozenset(f"aten::{name}" for name in ("argmax", "argmin", "argsort"))
_CHOOSE_AND_GIVE = frozenset(f"aten::{name}" for name in ("topk", "max", "min", "sort"))
_OPPOSITE = {
    "aten::eq": "aten::ne",
    "aten::ne": "aten::eq",
    "aten::lt": "aten::ge",
    "aten::ge": "aten::lt",
    "aten::gt": "aten::le",
    "aten::le": "aten::gt",
}
_MOVE = frozenset(
    f"aten::{name}"
    for name in (
        *("t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "flip", "expand", "select"),
        *("lift_fresh", "lift_fresh_copy"),
    )
)


def bounds(graph: ProgramGraph, ids: object) -> Bounds:
    """The least and the largest number that integers can hold, as far as the operators that made them say.

    The integers of a table are those it holds now: a program is compiled for them.
    """
    if isinstance(ids, int):
        return ids, ids
    if not isinstance(ids, Node) or not is_tensor(ids) or dtype(ids).is_floating_point:
        return _ANY
    if ids.op == "placeholder":
        return _held(graph, ids)
    found = _bounds(graph, ids)
    limits = torch.iinfo(dtype(ids)) if dtype(ids) != torch.bool else None
    if limits is None:
        return 0, 1
    low, high = found
    fits = low is not None and high is not None and limits.min <= low and high <= limits.max
    return found if fits or dtype(ids) == torch.int64 else _ANY


def never_negative(graph: ProgramGraph, ids: Node) -> bool:
    """Whether no id is negative: an index would count it from the end, the fused op drops it."""
    low, _ = bounds(graph, ids)
    return low is not None and low >= 0


def inside(graph: ProgramGraph, ids: Node, experts: int) -> bool:
    """Whether ids are numbers of experts, 0 … experts-1."""
    low, high = bounds(graph, ids)
    return low is not None and low >= 0 and high is not None and high < experts


def require_counted(graph: ProgramGraph, ids: Node, experts: int) -> None:
    """Every id is that of an expert, or was handed in as it is: then those that are none are in no segment.

    Raises Unproven: ids below 0 are sorted first, where the first expert's segment begins, and what a grouped
    product leaves in the rows past the last segment is nobody's answer.
    """
    if not handed_in(graph, ids) and not inside(graph, ids, experts):
        raise Unproven("R401", f"%{ids.name} may hold other numbers than those of {experts} experts")


def handed_in(graph: ProgramGraph, ids: Node) -> bool:
    """Whether ids are an input of the program, as the caller gives them."""
    while ids.target in VIEWS | CASTS | COPIES and isinstance(below := ids.args[0], Node):
        ids = below
    return ids.op == "placeholder" and graph.parameter(ids) is None


def _held(graph: ProgramGraph, table: Node) -> Bounds:
    if graph.parameter(table) is None:
        return _ANY
    tensor = graph.tensor(table)
    return _ANY if tensor.is_meta or not tensor.numel() else (int(tensor.min()), int(tensor.max()))


def _bounds(graph: ProgramGraph, node: Node) -> Bounds:
    name, below = operator_name(node), node.args[0] if node.args else None
    if name in _CHOOSE:
        return _places(node)
    if name == "getitem" and operator_name(chooser := node.all_input_nodes[0]) in _CHOOSE_AND_GIVE:
        return _places(chooser) if node.args[1] == 1 else bounds(graph, chooser.args[0])
    if node.target in VIEWS | CASTS | COPIES or name in _MOVE:
        return bounds(graph, below)
    match name:
        case "aten::cat" | "aten::concat" | "aten::stack":
            return _either([bounds(graph, part) for part in argument(node, "tensors")])
        case "aten::where" if len(node.args) == 3:
            chosen, other = (bounds(graph, part) for part in node.args[1:])
            chosen = _where(chosen, node.args[1], below, holds=True)
            return _either([chosen, _where(other, node.args[2], below, holds=False)])
        case "aten::masked_fill":
            kept = _where(bounds(graph, below), below, node.args[1], holds=False)
            return _either([kept, bounds(graph, node.args[2])])
        case "aten::index" if len(argument(node, "indices")) == 1:
            return bounds(graph, below)
        case "aten::remainder" if isinstance(n := node.args[1], int) and n > 0:
            return 0, n - 1
        case "aten::clamp" | "aten::clamp_min" | "aten::clamp_max":
            return _clamped(bounds(graph, below), argument(node, "min"), argument(node, "max"))
        case "aten::add" | "aten::sub" if argument(node, "alpha") == 1:
            sign = 1 if name == "aten::add" else -1
            return _moved(bounds(graph, below), node.args[1], lambda number, by: number + sign * by)
        case "aten::rsub" if argument(node, "alpha") == 1 and isinstance(whole := node.args[1], int):
            low, high = bounds(graph, below)
            return None if high is None else whole - high, None if low is None else whole - low
        case "aten::mul":
            return _moved(bounds(graph, below), node.args[1], lambda number, by: number * by, least=0)
        case "aten::floor_divide":
            return _moved(bounds(graph, below), node.args[1], lambda number, by: number // by, least=1)
    return _ANY


def _places(chooser: Node) -> Bounds:
    """The places along the dimension in which an operator looks."""
    scores, dim = chooser.args[0], argument(chooser, "dim", -1)
    assert isinstance(scores, Node)
    width = shape(scores)[dim] if isinstance(dim, int) else value(scores).numel()
    return 0, width - 1 if isinstance(width, int) else None


def _where(found: Bounds, ids: object, truth: object, *, holds: bool) -> Bounds:
    """The bounds of ids where it holds, or does not, that they compare so to a number."""
    if not isinstance(truth, Node) or len(truth.args) != 2 or truth.args[0] is not ids:
        return found
    compared, n = operator_name(truth), truth.args[1]
    if not isinstance(n, int) or compared not in _OPPOSITE:
        return found
    low, high = found
    match compared if holds else _OPPOSITE[compared]:
        case "aten::eq":
            return n, n
        case "aten::ne":
            return low + 1 if low is not None and low == n else low, high - 1 if high == n else high
        case "aten::lt":
            return low, n - 1 if high is None else min(high, n - 1)
        case "aten::le":
            return low, n if high is None else min(high, n)
        case "aten::gt":
            return n + 1 if low is None else max(low, n + 1), high
    return n if low is None else max(low, n), high


def _either(found: list[Bounds]) -> Bounds:
    lows, highs = zip(*found, strict=True)
    return None if None in lows else min(lows), None if None in highs else max(highs)


def _clamped(found: Bounds, least: object, largest: object) -> Bounds:
    low, high = found
    if any(end is not None and not isinstance(end, int) for end in (least, largest)):
        return _ANY
    if isinstance(least, int):
        low, high = least if low is None else max(low, least), None if high is None else max(high, least)
    if isinstance(largest, int):
        low = None if low is None else min(low, largest)
        high = largest if high is None else min(high, largest)
    return low, high


def _moved(found: Bounds, by: object, move: Callable[[int, int], int], least: int | None = None) -> Bounds:
    """Both ends moved by a number which, if `least` is given, must be at least that to keep their order."""
    if not isinstance(by, int) or (least is not None and by < least):
        return _ANY
    low, high = (None if end is None else move(end, by) for end in found)
    return low, high
