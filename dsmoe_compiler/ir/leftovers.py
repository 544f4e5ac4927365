"""What a replaced computation leaves behind in a program's signature: constants and symbols nobody reads."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type


def drop_leftovers(exported: ExportedProgram) -> None:
    """Remove lifted constants without users, and what is recorded of sizes read from data that are gone."""
    unused = {n for n in exported.graph.nodes if n.op == "placeholder" and not n.users}
    specs = exported.graph_signature.input_specs
    for spec in [s for s in specs if s.kind is InputKind.CONSTANT_TENSOR]:
        node = next((n for n in unused if n.name == getattr(spec.arg, "name", "")), None)
        if node is None:
            continue
        specs.remove(spec)
        exported.graph.erase_node(node)
        if all(s.target != spec.target for s in specs):
            exported.constants.pop(str(spec.target), None)
    exported.graph_module.recompile()
    read = _symbols(exported)
    for symbol in [s for s in exported.range_constraints if _is_of_data(s) and s not in read]:
        del exported.range_constraints[symbol]


def has_sizes_of_data(exported: ExportedProgram) -> bool:
    """Whether any size in the program is read from data."""
    return any(_is_of_data(symbol) for symbol in exported.range_constraints)


def _symbols(exported: ExportedProgram) -> set[sympy.Symbol]:
    values = [n.meta.get("val") for n in exported.graph.nodes]
    sizes = [
        size for v in pytree.tree_leaves(values) for size in (v.shape if isinstance(v, Tensor) else (v,))
    ]
    kinds = (torch.SymInt, torch.SymBool, torch.SymFloat)
    return {s for size in sizes if isinstance(size, kinds) for s in size.node.expr.free_symbols}


def _is_of_data(symbol: sympy.Symbol) -> bool:
    return bool(symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)))
