"""The products of a fused op, from its spec and the shapes of what it reads.

Letters: T tokens, D model width, E experts, K experts per token, F an expert's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from dsmoe_compiler.cost_model.sizes import Sizes
from dsmoe_compiler.ir import ops, reference
from dsmoe_compiler.ir.body import Body, Step
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse

LayerPart: TypeAlias = Literal["router", "routed experts", "shared experts"]


@dataclass(frozen=True)
class Share:
    """A part of a layer: FLOPs of one call, and the dtype of what is multiplied."""

    part: LayerPart
    flops: int
    dtype: str


@dataclass(frozen=True)
class LayerWork:
    """A call of a fused op: its parts, the width F of a routed expert, and that of all shared ones."""

    shares: tuple[Share, ...]
    width: int
    shared_width: int


def layer_work(node: Node, sizes: Sizes) -> LayerWork:
    """Of a fused op at these sizes: T·K pairs through an expert each, whatever is dropped; the router and the
    shared experts for every token. Raises OfData.
    """
    args = pytree.tree_map_only(Node, lambda n: sizes.on_meta(n.meta["val"]), node.args)
    return _moe(*args) if node.target is ops.MOE else _experts(*args)


def _moe(x: Tensor, router: list[Tensor], params: list[Tensor], shared: list[Tensor], text: str) -> LayerWork:
    spec, tokens = parse(text, MoESpec), x.shape[0]
    assert spec.router is not None
    weights, _ = reference.route_tokens(x.new_empty(1, x.shape[1]), router, spec)
    logits = spec.router.logits_dtype or _name(x)
    shares = [Share("router", 2 * tokens * router[0].numel(), logits)]
    routed = _expert(spec.experts, x, weights, params)
    if params:
        shares.append(Share("routed experts", tokens * spec.top_k * routed.flops, _name(params[0])))
    if spec.shared is not None:
        always = _Products.of(spec.shared.body, x, weights, shared, spec.experts.hidden)
        shares.append(Share("shared experts", tokens * always.flops, _name(shared[0])))
    return LayerWork(tuple(shares), routed.inner, spec.shared.width if spec.shared else 0)


def _experts(x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], text: str) -> LayerWork:
    routed = _expert(parse(text, ExpertsSpec), x, weights, params)
    shares = [Share("routed experts", ids.numel() * routed.flops, _name(params[0]))] if params else []
    return LayerWork(tuple(shares), routed.inner, 0)


def _expert(spec: ExpertsSpec, x: Tensor, weights: Tensor, params: Sequence[Tensor]) -> _Products:
    one = [torch.empty(p.shape[1:], dtype=p.dtype, device="meta") for p in params]
    return _Products.of(spec.body, x, weights, one, spec.hidden)


@dataclass
class _Products:
    """A body's products for one row: FLOPs, and the width of what the last of them reads."""

    flops: int = 0
    inner: int = 0

    @staticmethod
    def of(body: Body, x: Tensor, weights: Tensor, params: Sequence[Tensor], hidden: int) -> _Products:
        """Found by running the body on one row of the meta device."""
        found = _Products()
        row, weight = x.new_empty(1, hidden), weights.new_empty(1, 1)
        reference.evaluate(body, row, weight, params, found.multiply)
        return found

    def multiply(self, step: Step, row: Tensor, weight: Tensor) -> Tensor:
        """The product itself, counted."""
        made = torch.nn.functional.linear(row, weight) if step.op == "linear" else torch.matmul(row, weight)
        self.flops += 2 * made.numel() * row.shape[-1]
        self.inner = row.shape[-1]
        return made


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
