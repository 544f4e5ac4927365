"""A pass of this compiler, broken on purpose: what validation is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass, PassLog


@dataclass(frozen=True)
class Sabotaged:
    """Another pass, whose fused ops are then given another spec or other arguments."""

    honest: Pass
    change: Callable[[list[Any]], list[Any]]
    name: ClassVar[str] = "sabotaged"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """What the honest pass does, and one thing wrong."""
        changed = self.honest.run(graph, log)
        made = {f.op for f in log.layers.values()}
        for node in graph.nodes:
            if node.name in made and node.target in (ops.EXPERTS, ops.MOE):
                node.args = tuple(self.change(list(node.args)))
        return changed
