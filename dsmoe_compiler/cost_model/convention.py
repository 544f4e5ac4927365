"""Training FLOPs of one sequence as the DeepSeekMoE paper (arXiv 2401.06066) counts them, of a built model.

Its tables give figures alone; this is what reproduces them, for T tokens, width d, L layers, V words:

    3 · (2T · (L · 4d² + L · W + dV) + L · 4dT²)

three for forward and backward, 4d² the projections of a layer's attention, W the weights of the experts that
a token uses, dV the head, 4dT² both products of attention, every token with every token. The embedding, norms
and routers are not counted. All is measured on the model but for three substitutions: keys and values count
as wide as queries, each layer counts as an MoE layer, a first dense one too, and where the paper's experts
are parts of a standard feed-forward of 8d² weights, that part counts and not the width it was rounded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from dsmoe_compiler.cost_model.cost import BACKWARD
from dsmoe_compiler.cost_model.held import held
from dsmoe_compiler.cost_model.parts import Mixture, mixtures_of
from dsmoe_compiler.cost_model.sizes import sizes_at
from dsmoe_compiler.cost_model.work import Work, work_of
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.report.report import Report

STANDARD = 8  # weights of a standard feed-forward, in d²: three matrices, 8/3·d wide


class NotMeasured(Exception):
    """The convention does not apply to this model, and why."""


@dataclass(frozen=True)
class ExpertWeights:
    """Of one MoE layer: how many experts a token uses, S and K, and the weights of all and of those."""

    used: int
    weights: int
    activated: int


@dataclass(frozen=True)
class Measured:
    """A built model's products over one sequence of `tokens`.

    `width` is d; `attention` and `head` are forward FLOPs; `queries` the weights of each layer's query
    projection, `routers` of all routers, `dense` of each dense feed-forward, `layers` the experts' of each
    MoE layer.
    """

    tokens: int
    width: int
    attention: int
    head: int
    queries: tuple[int, ...]
    routers: int
    dense: tuple[int, ...]
    layers: tuple[ExpertWeights, ...]

    def training_flops(self, part: Fraction | None) -> int:
        """By the convention; `part` of a standard feed-forward that an expert is in the paper, None: as
        wide as it was built.
        """
        weights = 4 * sum(self.queries) + self._feed_forwards(part)
        return int((1 + BACKWARD) * (self.attention + self.head + 2 * self.tokens * weights))

    @property
    def expert_weights(self) -> int:
        """Of all feed-forwards, which in a dense model are one expert a layer."""
        return sum(self.dense) + sum(layer.weights for layer in self.layers)

    @property
    def activated_expert_weights(self) -> int:
        """Those of them that a token uses."""
        return sum(self.dense) + sum(layer.activated for layer in self.layers)

    def _feed_forwards(self, part: Fraction | None) -> Fraction:
        standard = STANDARD * self.width**2
        if not self.layers:
            return Fraction(sum(self.dense)) if part is None else part * standard * len(self.dense)
        one = self.layers[0]
        return len(self.queries) * (Fraction(one.activated) if part is None else one.used * part * standard)


def measure(graph: ProgramGraph, report: Report, tokens: int) -> Measured:
    """A causal language model after the passes. Raises NotMeasured where a layer is not fused, MoE layers
    differ, or something is no such model.
    """
    if refused := [layer for layer in report.layers if not layer.fused]:
        raise NotMeasured(f"{refused[0].name} is not fused ({refused[0].refusal})")
    sizes = sizes_at(graph.exported, 1, tokens)
    works = work_of(graph, sizes).works
    if not works or works[-1].kind != "weights":
        raise NotMeasured("it does not end with a head")
    *body, head = works
    attending = list(dict.fromkeys(work.module for work in body if work.kind == "activations"))
    mixtures = mixtures_of(graph, sizes, held(graph))
    layers = tuple(
        _experts(mixture, [w for w in body if w.node == node], tokens) for node, mixture in mixtures.items()
    )
    if len(set(layers)) > 1:
        raise NotMeasured("its MoE layers are not all alike")
    inside = tuple(f"{layer.name}." for layer in report.layers)
    dense, routers = dict[tuple[str, ...], int](), 0
    for work in body:
        place = ".".join(work.module) + "."
        # In a mixture's module but not in its op is a router that stayed as written.
        if work.kind == "router" or work.kind == "weights" and place.startswith(inside):
            routers += work.flops // (2 * tokens)
        elif work.kind == "weights" and work.module not in attending:
            dense[work.module] = dense.get(work.module, 0) + prod(work.weight)
    return Measured(
        tokens=tokens,
        width=head.weight[-1],
        attention=sum(work.flops for work in body if work.kind == "activations"),
        head=head.flops,
        queries=tuple(_widest(body, module) for module in attending),
        routers=routers,
        dense=tuple(dense.values()),
        layers=layers,
    )


def _experts(mixture: Mixture, works: Sequence[Work], tokens: int) -> ExpertWeights:
    shared = sum(work.flops for work in works if work.kind == "shared experts") // (2 * tokens)
    routed = sum(work.flops for work in works if work.kind == "routed experts") // (2 * tokens)
    all_routed = routed * mixture.experts // mixture.top_k
    return ExpertWeights((mixture.shared or 0) + mixture.top_k, shared + all_routed, shared + routed)


def _widest(works: Sequence[Work], module: tuple[str, ...]) -> int:
    """The weights of the largest projection of an attention, which is the queries'."""
    return max(prod(work.weight) for work in works if work.module == module and work.kind == "weights")
