"""The fused layers of a graph, those that are alike said once, and tensors to call their kernels with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse
from dsmoe_compiler.runtime.layers import experts_layer, moe_layer


@dataclass(frozen=True)
class Operands:
    """The tensors of one call: x (T, D); `router`, `params` and `shared` as in `ir.ops`; ids and weights
    (T, K) where no kernel routes.
    """

    x: Tensor
    params: tuple[Tensor, ...]
    router: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class FusedLayer:
    """Layers of a model whose kernels are the same: their names, in execution order, what they are, how code
    generation sees them, and the tensors of a call with one token, on the meta device.
    """

    names: tuple[str, ...]
    spec: MoESpec
    layer: Layer
    operands: Operands

    @property
    def dtype(self) -> str:
        """That of the experts' weights: "bfloat16"."""
        return self.layer.params[0].dtype

    def on_meta(self, tokens: int) -> Operands:
        """The tensors of a call with so many tokens, on the meta device."""
        given = self.operands
        ids, weights = (t if t is None else _longer(t, tokens) for t in (given.ids, given.weights))
        return replace(given, x=_longer(given.x, tokens), ids=ids, weights=weights)

    def arguments(self, given: Operands) -> dict[str, Any]:
        """What a module's host function takes of these tensors, by name."""
        taken: dict[str, Any] = {"x": given.x, "params": given.params}
        if self.layer.router:
            taken["router"] = given.router
        else:
            taken |= {"ids": given.ids, "weights": given.weights}
        if self.layer.added:
            assert self.spec.shared is not None
            taken["added"] = reference.shared_experts(given.x, given.shared, self.spec.shared)
        elif self.layer.shared:
            taken["shared"] = given.shared
        return taken


def fused_layers(graph: ProgramGraph, names: Mapping[str, str]) -> tuple[FusedLayer, ...]:
    """The fused layers of a graph after its passes, those that are alike as one. `names` are the layers' by
    their ops'; an op that none is named for has no weights. Nothing is read of tensors but how they lie.
    """
    alike = dict[tuple[Layer, torch.dtype | None], FusedLayer]()
    for node in [n for n in graph.nodes if n.name in names]:
        name = names[node.name]
        found = _moe(name, node) if node.target is ops.MOE else _experts(name, node)
        key = (found.layer, found.operands.ids.dtype if found.operands.ids is not None else None)
        known = alike.get(key)
        alike[key] = found if known is None else replace(known, names=(*known.names, name))
    return tuple(alike.values())


def _moe(name: str, node: Node) -> FusedLayer:
    x, *groups, spec = node.args
    router, params, shared = (_lying(group) for group in groups)
    given = Operands(_token(x), params, router, shared)
    layer, text = parse(str(spec), MoESpec), str(spec)
    made = moe_layer(given.x, router, params, shared, text)
    if not made.can_route:
        made = replace(made, router=None, router_params=())
        weights, ids = reference.route_tokens(given.x, router, layer)
        given = replace(given, ids=ids, weights=weights)
    return FusedLayer((name,), layer, made, given)


def _experts(name: str, node: Node) -> FusedLayer:
    x, ids, weights, params, spec = node.args
    given = Operands(_token(x), _lying(params), ids=_token(ids), weights=_token(weights))
    assert given.ids is not None and given.weights is not None
    layer = MoESpec(given.ids.shape[1], parse(str(spec), ExpertsSpec))
    made = experts_layer(given.x, given.ids, given.weights, given.params, str(spec))
    return FusedLayer((name,), layer, made, given)


def _lying(nodes: Any) -> tuple[Tensor, ...]:
    """Tensors of the meta device that lie as the nodes' values do."""
    values = [node.meta["val"] for node in nodes]
    return tuple(
        torch.empty_strided(
            [int(s) for s in v.shape], [int(s) for s in v.stride()], dtype=v.dtype, device="meta"
        )
        for v in values
    )


def _token(node: Any) -> Tensor:
    """One row of a node's value, on the meta device."""
    value = node.meta["val"]
    return torch.empty(1, int(value.shape[1]), dtype=value.dtype, device="meta")


def _longer(row: Tensor, tokens: int) -> Tensor:
    return row.new_empty(tokens, row.shape[1])
