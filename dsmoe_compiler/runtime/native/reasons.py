"""Why a fused layer runs by torch's operators where there are native kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.ir import reference
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.runtime.fused_layers import FusedLayer, fused_layers
from dsmoe_compiler.runtime.native.experts import choose
from dsmoe_compiler.runtime.native.library import Library, native


def not_native(graph: ProgramGraph, names: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The layers of a graph that the native kernels do not run, wholly or in part, each with the reason; none
    where there are no kernels. `names` are the layers' names by their ops'.
    """
    library = native()
    if not isinstance(library, Library):
        return
    for layer in fused_layers(graph, names):
        if why := _why(library, layer):
            yield layer.names, why


def _why(library: Library, layer: FusedLayer) -> str:
    given, spec = layer.operands, layer.spec
    weights = given.weights
    if weights is None:
        weights, _ = reference.route_tokens(given.x, given.router, spec)
    try:
        choose(library, spec.experts, given.x, weights, given.params)
    except Unsupported as e:
        return str(e)
    if spec.shared is None:
        return ""
    try:
        choose(library, spec.experts, given.x, weights, given.params, spec.shared, given.shared)
    except Unsupported as e:
        return f"of its shared experts: {e}"
    return ""
