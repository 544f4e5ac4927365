"""The parts of a model by their FLOPs: MoE layers, attention, feed-forwards, the head; those alike as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from dsmoe_compiler.cost_model.fused import layer_work
from dsmoe_compiler.cost_model.held import Held, fused_ops, routed_tensors, routing_of
from dsmoe_compiler.cost_model.sizes import Sizes
from dsmoe_compiler.cost_model.work import Unknown, Work, Worked
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.report.report import Report


@dataclass(frozen=True)
class Mixture:
    """What a fused MoE layer is: E experts of `width` F each, K chosen for a token, and the hidden width of
    its shared experts together; the parameters of its routed experts, and of the chosen ones of them.
    """

    experts: int
    top_k: int
    width: int
    shared_width: int
    parameters: int
    activated: int

    @property
    def shared(self) -> int | None:
        """S, shared experts as wide as a routed one; None where that gives no whole number."""
        return None if not self.width or self.shared_width % self.width else self.shared_width // self.width


@dataclass(frozen=True)
class Part:
    """Modules that are alike. `flops` of each of them in one forward; `mixture` of fused MoE layers;
    `refused` of MoE layers that stayed as written; `complete` where all that they multiply is counted.
    """

    names: tuple[str, ...]
    flops: int
    mixture: Mixture | None = None
    refused: bool = False
    complete: bool = True

    @property
    def total(self) -> int:
        """Of all of them."""
        return self.flops * len(self.names)


def parts_of(
    graph: ProgramGraph, report: Report, worked: Worked, sizes: Sizes, tensors: Sequence[Held]
) -> tuple[Part, ...]:
    """In execution order. All that stands in a layer's module counts to the layer."""
    fused = [layer.name for layer in report.layers if layer.fused]
    refused = [layer.name for layer in report.layers if not layer.fused]
    owners = {node.name: name for node, name in zip(fused_ops(graph), fused, strict=True)}
    found = dict[str, Part]()
    products: tuple[Work | Unknown, ...] = (*worked.works, *worked.unknown)
    for each in products:
        name = owners.get(each.node) or _owner(each.module, [*fused, *refused])
        known = found.get(name, Part((name,), 0, refused=name in refused))
        found[name] = replace(
            known,
            flops=known.flops + (each.flops if isinstance(each, Work) else 0),
            complete=known.complete and isinstance(each, Work),
        )
    for node, mixture in mixtures_of(graph, sizes, tensors).items():
        name = owners[node]
        if name in found and found[name].mixture is None:
            found[name] = replace(found[name], mixture=mixture)
    return _folded(found.values())


def mixtures_of(graph: ProgramGraph, sizes: Sizes, tensors: Sequence[Held]) -> dict[str, Mixture]:
    """What each fused op is, by its node's name, in execution order."""
    return {node.name: _mixture(graph, node, sizes, tensors) for node in fused_ops(graph)}


def _owner(module: tuple[str, ...], layers: Sequence[str]) -> str:
    """The MoE layer that a module is or stands in, else the module itself."""
    name = ".".join(module)
    return next((layer for layer in layers if layer and f"{name}.".startswith(f"{layer}.")), name)


def _mixture(graph: ProgramGraph, node: Node, sizes: Sizes, tensors: Sequence[Held]) -> Mixture:
    work, routing = layer_work(node, sizes), routing_of(node)
    names = {graph.parameter(tensor) for tensor in routed_tensors(graph, node)}
    own = [t for t in tensors if t.is_parameter and not names.isdisjoint(t.names)]
    return Mixture(
        experts=routing.experts,
        top_k=routing.top_k,
        width=work.width,
        shared_width=work.shared_width,
        parameters=sum(t.numel for t in own),
        activated=int(sum(t.numel * routing.share for t in own)),
    )


def _folded(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts whose names differ in numbers alone, and nothing else, as one."""
    alike = dict[object, Part]()
    for part in parts:
        key = (re.sub(r"\d+", "#", part.names[0]), replace(part, names=()))
        known = alike.get(key)
        alike[key] = part if known is None else replace(known, names=(*known.names, *part.names))
    return tuple(alike.values())
