"""The matrix products of a graph: where each stands, what it is, how many FLOPs it is at given sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from dsmoe_compiler.cost_model.formulas import NotCounted, can_multiply, flops_of, is_attention
from dsmoe_compiler.cost_model.fused import LayerPart, layer_work
from dsmoe_compiler.cost_model.sizes import OfData, Sizes
from dsmoe_compiler.ir import ops
from dsmoe_compiler.ir.graph import ProgramGraph, module_path

# What activations meet in a product: each other, as in attention, or the model's tensors; a fused op's parts.
Kind: TypeAlias = Literal["activations", "weights"] | LayerPart
KINDS: tuple[Kind, ...] = ("activations", "weights", "router", "routed experts", "shared experts")


@dataclass(frozen=True)
class Work:
    """The products of one node, or of one part of a fused op. `module` is where it stands, torch's own
    modules (nn.Linear) being part of what holds them; `dtype` is that of what it multiplies, `weight` the
    shape of the model's own tensor in it, () where there is none.
    """

    node: str
    module: tuple[str, ...]
    kind: Kind
    dtype: str
    flops: int
    weight: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unknown:
    """A node whose products are not counted, and why."""

    node: str
    module: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Worked:
    """All products of a graph in execution order, and what may have some that are not counted."""

    works: tuple[Work, ...]
    unknown: tuple[Unknown, ...]

    @property
    def flops(self) -> int:
        """Of one forward."""
        return sum(work.flops for work in self.works)


def work_of(graph: ProgramGraph, sizes: Sizes) -> Worked:
    """Count every node by itself, from its operands' shapes: nothing is run."""
    counter, works, unknown = _Counter(sizes, _own_values(graph)), list[Work](), list[Unknown]()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        try:
            works += counter.count(node)
        except OfData:
            if _may_multiply(node):
                unknown.append(Unknown(node.name, _place(node), "sizes depend on data"))
        except NotCounted as e:
            if _may_multiply(node):
                unknown.append(Unknown(node.name, _place(node), str(e)))
    return Worked(tuple(works), tuple(unknown))


class _Counter:
    """Counts nodes; those with operands of the same shapes once."""

    def __init__(self, sizes: Sizes, own: set[Node]) -> None:
        self._sizes = sizes
        self._own = own
        self._known: dict[object, int] = {}

    def count(self, node: Node) -> Iterator[Work]:
        """The works of a node with a FLOP at least. Raises OfData, NotCounted."""
        if node.target not in (ops.MOE, ops.EXPERTS):
            yield from self._operator(node)
            return
        for share in layer_work(node, self._sizes).shares:
            if share.flops:
                yield Work(node.name, _place(node), share.part, share.dtype, share.flops)

    def _operator(self, node: Node) -> Iterator[Work]:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotCounted(f"{node.target} runs graphs of its own")
        if not isinstance(node.target, torch._ops.OpOverload) or not _gives_numbers(node):
            return
        args, kwargs = pytree.tree_map_only(Node, self._value, (node.args, node.kwargs))
        # Nothing may be made where the model lives, whatever place its code names.
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (node.target, spec, tuple(map(_shown, leaves)))
        if key not in self._known:
            self._known[key] = flops_of(node.target, args, kwargs)
        if flops := self._known[key]:
            operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            weight = None if is_attention(node.target) else self._weight(operands)
            kind: Kind = "activations" if weight is None else "weights"
            shape = () if weight is None else tuple(self._sizes.on_meta(weight.meta["val"]).shape)
            yield Work(node.name, _place(node), kind, _name(operands[0].meta["val"].dtype), flops, shape)

    def _weight(self, operands: Sequence[Node]) -> Node | None:
        """The model's own operand of a product, which may add a bias as well; None where it has none."""
        own = [n for n in operands if n in self._own]
        matrices = [n for n in own if n.meta["val"].dim() > 1]
        return next(iter(matrices), own[0] if own and len(own) == len(operands) - 1 else None)

    def _value(self, node: Node) -> Any:
        """A node's value at these sizes: tensors on the meta device, numbers as they are."""
        return pytree.tree_map(self._at_sizes, node.meta.get("val"))

    def _at_sizes(self, value: Any) -> Any:
        return self._sizes.on_meta(value) if isinstance(value, Tensor) else self._sizes.number(value)


def _place(node: Node) -> tuple[str, ...]:
    """The innermost module that is not one of torch's, unless those are all there is."""
    path = module_path(node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner = stack[-1][1] if stack else ""
    kind = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
    return path[:-1] if kind.startswith("torch.nn.") and len(path) > 1 else path


def _own_values(graph: ProgramGraph) -> set[Node]:
    """The values computed from the model's own tensors alone."""
    own = set[Node]()
    for node in graph.nodes:
        if node.op == "placeholder":
            if graph.parameter(node) is not None:
                own.add(node)
        elif node.all_input_nodes and all(n in own for n in node.all_input_nodes):
            own.add(node)
    return own


def _gives_numbers(node: Node) -> bool:
    """Whether a result is a tensor of a dtype that products have, of which the small integers' is int32."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) and (v.dtype.is_floating_point or v.dtype in _ALSO) for v in values)


_ALSO = (torch.int32, torch.complex64, torch.complex128)


def _may_multiply(node: Node) -> bool:
    if node.target in (ops.MOE, ops.EXPERTS) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload) and _gives_numbers(node) and can_multiply(node.target)
    )


def _shown(leaf: Any) -> object:
    """What of an operand the number of FLOPs depends on."""
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
