"""Values that a model keeps from call to call: an ONNX model keeps none."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from dsmoe_compiler.ir.errors import ExportError
from dsmoe_compiler.ir.graph import ProgramGraph, alias_root, mutated_argument

aten = torch.ops.aten
_OVERWRITES = frozenset({aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default})


def refuse_state(exported: ExportedProgram) -> None:
    """Raises ExportError where an output depends on a buffer or parameter that the model itself writes.

    What is written and not read (a counter of calls), or overwritten before it is read, is no state.
    """
    program = ProgramGraph(exported)
    kept = dict[Node, str]()
    for node in program.nodes:
        written = mutated_argument(node)
        root = alias_root(written) if written is not None else None
        name = program.parameter(root)
        if root is not None and name and not _overwritten_first(program, root):
            kept[root] = name
    read = _needed(program.graph.output_node()) if kept else set()
    for root, name in kept.items():
        if root in read:
            raise ExportError(
                f"an ONNX model keeps nothing from call to call: this one writes to its {name}, and what it "
                "gives depends on that"
            )


def _overwritten_first(program: ProgramGraph, root: Node) -> bool:
    """Whether the first that the graph does with these values is to replace them all."""
    first = next(node for node in program.nodes if root in node.all_input_nodes)
    return first.target in _OVERWRITES and first.args[0] is root and root not in first.args[1:]


def _needed(output: Node) -> set[Node]:
    """All that the output is computed from."""
    needed, waiting = set[Node](), [output]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    return needed
