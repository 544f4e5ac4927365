"""Sizes that a program rounds, in operators that torch can write into a file.

A capacity of ceil(2·T/E) is `math.ceil` of a fraction in the captured graph, for which torch's serialiser has
no form.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def round_by_division(exported: ExportedProgram) -> None:
    """Replace floor(x) by int(x // 1), and ceil(x) by int(−(−x // 1)): the same numbers, exactly."""
    graph = exported.graph
    for node in [n for n in graph.nodes if n.target in (math.ceil, math.floor)]:
        whole: tuple[Any, ...] = node.args
        with graph.inserting_before(node):
            for function, *others in _STEPS[node.target]:
                made = graph.call_function(function, (*whole, *others))
                made.meta = {**node.meta, "val": function(*map(_value, made.args))}
                whole = (made,)
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    exported.graph_module.recompile()


_STEPS: dict[Any, tuple[tuple[Any, ...], ...]] = {
    math.floor: ((operator.floordiv, 1), (torch.sym_int,)),
    math.ceil: ((operator.neg,), (operator.floordiv, 1), (operator.neg,), (torch.sym_int,)),
}


def _value(argument: object) -> object:
    return argument.meta["val"] if isinstance(argument, Node) else argument
