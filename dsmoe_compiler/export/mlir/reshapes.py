"""Reshapes spelled as what they merge and what they split, which torch-mlir lowers exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import sympy
import torch
from torch import SymInt
from torch.fx import Graph, Node

_RESHAPES = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
)
_MERGE, _SPLIT = torch.ops.aten.flatten.using_ints, torch.ops.aten.unflatten.int
_Size = int | SymInt


class Group(NamedTuple):
    """Dimensions [first, end) of a reshape's operand that become [out_first, out_end) of its result."""

    first: int
    end: int
    out_first: int
    out_end: int


def spell_reshapes(graph: Graph) -> None:
    """Replace reshapes of sizes that vary.

    torch-mlir reads a reshape dimension by dimension, without symbols: where a size that varies meets another
    it takes them for equal, and what is left over for 1. So (B, L, D) to (B·L, D) is lowered to a program
    that computes something else whenever L is not 1 (llvm/torch-mlir issue 4743). Here the symbols are known:

    before: %y = aten.view(%x, [b·l, d])
    after:  %y = aten.flatten(%x, 0, 1)
    """
    for node in list(graph.nodes):
        if node.target in _RESHAPES:
            shapes = [*node.args[0].meta["val"].shape], [*node.meta["val"].shape]
            if any(isinstance(size, SymInt) for size in (*shapes[0], *shapes[1])):
                _spell(graph, node, *shapes)


def _spell(graph: Graph, node: Node, shape: list[_Size], out: list[_Size]) -> None:
    """The node itself becomes the last step, so that what names it in the program's signature is right."""
    sizes: Any = node.args[1]
    steps = list[tuple[Any, tuple[Any, ...], list[_Size]]]()
    for group in reversed(groups(_expressions(shape), _expressions(out))):  # so that what comes first stays
        first, end, out_first, out_end = group
        if end - first > 1:
            shape = [*shape[:first], prod(shape[first:end]), *shape[end:]]
            steps.append((_MERGE, (first, end - 1), shape))
        if out_end - out_first > 1:
            shape = [*shape[:first], *out[out_first:out_end], *shape[first + 1 :]]
            steps.append((_SPLIT, (first, list(sizes[out_first:out_end])), shape))
    value: Any = node.args[0]
    for target, rest, between in steps[:-1]:
        with graph.inserting_before(node):
            value = graph.call_function(target, (value, *rest))
        value.meta["val"] = node.meta["val"].new_empty(between)
    if steps:  # none where nothing but ones moved or the shape stays
        target, rest, _ = steps[-1]
        node.target, node.args = target, (value, *rest)


def groups(shape: Sequence[sympy.Expr], out: Sequence[sympy.Expr]) -> list[Group]:
    """The fewest dimensions that hold the same elements in operand and result, left to right.

        (b, l, 96) to (b·l, 4, 24):  [0, 2) to [0, 1), [2, 3) to [1, 3)

    A one goes with what comes next to it. Without an operand's or a result's dimension there are none.
    """
    before, after = _products(shape), _products(out)
    found = list[Group]()
    i = j = 0
    while i < len(shape) and j < len(out):
        ends = product(range(i + 1, len(shape) + 1), range(j + 1, len(out) + 1))
        # At the ends the products are equal whatever form the expressions have.
        whole = len(shape), len(out)
        end, out_end = min(((a, b) for a, b in ends if before[a] == after[b] or (a, b) == whole), key=sum)
        found.append(Group(i, end, j, out_end))
        i, j = end, out_end
    if found:
        found[-1] = found[-1]._replace(end=len(shape), out_end=len(out))  # ones at the end
    return found


def _products(sizes: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """How many elements the first 0, 1, 2, … dimensions hold."""
    held = [sympy.Integer(1)]
    for size in sizes:
        held.append(sympy.expand(held[-1] * size))
    return held


def _expressions(shape: Sequence[_Size]) -> list[sympy.Expr]:
    return [size.node.expr if isinstance(size, SymInt) else sympy.Integer(size) for size in shape]
