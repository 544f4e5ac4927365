"""Translation validation: the value a pass put in, against the value it took out, on numbers.

A replacement is checked where it happened: the part of the graph between its inputs and the two values runs
on a few dozen tokens with the layer's own weights, under several routings (random, everything on a few
experts, half of the experts empty). Sizes that vary get small numbers; nothing outside the layer runs.

How far apart two right answers may be, relative to the largest number of the old one:

- both sides round the same intermediates to the layer's dtype, or to that of its experts if that has fewer
  digits; each of the at most 8 roundings may fall on the other side after another order of summation:
  8·eps(dtype);
- sums of n products, accumulated in fp32 in two orders, differ by about sqrt(n)·eps(fp32); 8 of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from dsmoe_compiler.ir import decompose, ops
from dsmoe_compiler.ir.graph import ProgramGraph, aten, depends_on_data, is_tensor, shape
from dsmoe_compiler.ir.passes import Replacement
from dsmoe_compiler.ir.spec import ExpertsSpec, MoESpec, parse
from dsmoe_compiler.ir.stand_in import STAND_INS
from dsmoe_compiler.packing import pack

# What each symbolic size is for one check.
Sizes: TypeAlias = dict[sympy.Expr, sympy.Expr]
# Sizes read from data that a layer's inputs come with.
Given: TypeAlias = frozenset[sympy.Symbol]

# Sizes tried for the varying dimensions, most tokens first, until the largest intermediate fits the budget.
_SIZES = ((3, 11, 2, 5), (2, 7, 2, 3), (2, 3, 2, 2), (1, 2, 1, 1))
_LIKE = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})
_BUDGET = 2**24  # numbers in the largest intermediate of the old value: 64 MB of fp32
_GATHERED = 2**22  # numbers of weights gathered per pair, past which a loop over experts is cheaper


@dataclass(frozen=True)
class Verdict:
    """The largest relative error seen, what was allowed, whether the layer's weights hold NaN, and what from
    outside the layer it would take to check it ("" if nothing).
    """

    error: float
    allowed: float
    has_nan: bool = False
    outside: str = ""

    @property
    def passed(self) -> bool:
        return not self.has_nan and not self.outside and self.error <= self.allowed


def validate(graph: ProgramGraph, change: Replacement, seed: int = 0) -> Verdict:
    """Run both values of a replacement on the same inputs and compare."""
    given = _given(change.inputs)
    region = _between(change.inputs, (change.old, change.new), given)
    for node in region:
        if node.op == "placeholder" and node not in change.inputs and graph.parameter(node) is None:
            return Verdict(math.nan, 0.0, outside=node.name)
    inside = set(_between(change.inputs, (change.old,), given)) - set(change.inputs)
    kept = any(n.target in STAND_INS for n in inside)
    params = [
        n for n in region if graph.parameter(n) is not None and not (kept and _only_of_experts(n, region))
    ]
    if any(_holds_nan(graph.tensor(p)) for p in params):
        return Verdict(math.nan, 0.0, has_nan=True)
    sizes = _choose_sizes(region)
    products = max(_contraction(graph, p) for p in params) if params else 1
    allowed = tolerance(_coarsest(change, region), products)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    tensors = {n: graph.tensor(n) for n in region if graph.parameter(n) is not None}
    tensors |= _packs(graph, region)
    with torch.no_grad():
        for inputs in _routings(change, sizes, generator):
            values = dict(inputs) | tensors
            run = _Run(sizes, given, stand_ins=kept)
            old, new = (run.value(result, dict(values)) for result in (change.old, change.new))
            worst = max(worst, relative_error(new, old))
    return Verdict(worst, allowed)


def _packs(graph: ProgramGraph, region: list[Node]) -> dict[Node, Tensor]:
    """The experts' own tensors, brought together before they are read: copies would cost memory."""
    found = dict[Node, Tensor]()
    state = [*graph.exported.state_dict.values(), *graph.exported.constants.values()]
    for node in region:
        if node.target is ops.PACK:
            parts = node.args[0]
            assert isinstance(parts, (list, tuple))
            whole = pack([graph.tensor(p) for p in parts if isinstance(p, Node)], state)
            if whole is not None:
                found[node] = whole
    return found


def _coarsest(change: Replacement, region: list[Node]) -> torch.dtype:
    """The type with the fewest digits among the value's own and those that its experts compute in: they are
    often added up in a type with more.
    """
    read = (a for n in region if n.target is ops.EXPERTS for a in n.all_input_nodes if is_tensor(a))
    kinds: list[torch.dtype] = [change.old.meta["val"].dtype, *(a.meta["val"].dtype for a in read)]
    return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)


def tolerance(dtype: torch.dtype, products: int) -> float:
    """The relative difference that rounding alone explains, for sums of `products` products."""
    accumulation = 8 * math.sqrt(products) * torch.finfo(torch.float32).eps
    return max(8 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0, accumulation)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual − expected| / max|expected|; inf where shapes, dtypes or NaNs differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = actual.double(), expected.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    difference = (a - b).abs().nan_to_num(0.0, posinf=math.inf).max().item()
    scale = b.abs().nan_to_num(0.0).max().item()
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _given(inputs: tuple[Node, ...]) -> Given:
    """The symbols for sizes read from data that the inputs' own shapes have."""
    return frozenset(s for n in inputs for size in _sizes_of(n) for s in _symbols(size))


def _between(inputs: tuple[Node, ...], results: tuple[Node, ...], given: Given) -> list[Node]:
    """The nodes that compute the results from the inputs, in execution order; both ends included."""
    needed, stack = set[Node](), list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in inputs and not _is_size(node, given):
                stack.extend(n for n in node.all_input_nodes if n is not _likeness(node))
    return sorted(needed)


def _is_size(node: Node, given: Given) -> bool:
    """A number that follows from the sizes of the inputs; another that depends on data is computed."""
    size = node.meta.get("val")
    if not isinstance(size, torch.SymInt):
        return isinstance(size, int)
    return not depends_on_data(size) or given.issuperset(_symbols(size))


def _choose_sizes(region: list[Node]) -> Sizes:
    """The largest of the small sizes at which every intermediate fits, or the smallest sizes."""
    symbols = list(dict.fromkeys(s for n in region for size in _sizes_of(n) for s in _symbols(size)))
    candidates = [
        {s: sympy.Integer(sizes[i % len(sizes)]) for i, s in enumerate(symbols)} for sizes in _SIZES
    ]
    calls = [n for n in region if n.op == "call_function"]
    fitting = [c for c in candidates if max((_numel(n, c) for n in calls), default=0) <= _BUDGET]
    return (fitting or candidates[-1:])[0]


def _likeness(node: Node) -> Node | None:
    """What an operator such as zeros_like reads for its sizes and type alone: perhaps outside the layer."""
    return node.all_input_nodes[0] if node.target in _LIKE else None


def _gathered(node: Node, sizes: Sizes) -> int:
    """How many numbers a fused op's weights have when each pair gathers its expert's."""
    x, text = node.args[0], str(node.args[-1])
    assert isinstance(x, Node)
    slots: int | torch.SymInt
    if node.target is ops.EXPERTS:
        assert isinstance(node.args[1], Node)
        slots = shape(node.args[1])[1]
    else:
        slots = parse(text, MoESpec).top_k
    numbers = (math.prod(_number(s, sizes) for s in shape(p)[1:]) for p in _experts_tensors(node))
    widest = max(numbers, default=0)
    return _number(shape(x)[0], sizes) * _number(slots, sizes) * widest


def _sizes_of(node: Node) -> tuple[Any, ...]:
    size = node.meta.get("val")
    return shape(node) if is_tensor(node) else (size,) if isinstance(size, (int, torch.SymInt)) else ()


def _symbols(size: int | torch.SymInt) -> list[sympy.Expr]:
    if not isinstance(size, torch.SymInt):
        return []
    # A size that depends on data is at most the number of pairs: here, no more than an input's size.
    return sorted(size.node.expr.free_symbols, key=str)


def _numel(node: Node, sizes: Sizes) -> int:
    return math.prod(_number(s, sizes) for s in shape(node)) if is_tensor(node) else 0


def _number(size: int | torch.SymInt, sizes: Sizes) -> int:
    return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else size


def _routings(change: Replacement, sizes: Sizes, generator: torch.Generator) -> Iterator[dict[Node, Tensor]]:
    """Inputs under several routings; where the ids are computed from x, x itself is what varies."""
    experts, tokens = change.choices or _experts(change.new), _tokens(change.new, sizes)
    for kind in ("random", "skewed", "half empty"):
        inputs: dict[Node, Tensor] = {}
        for node in change.inputs:
            example = node.meta["val"]
            dims = [_number(s, sizes) for s in example.shape]
            if example.is_floating_point():
                made = torch.randn(dims, generator=generator)
                if kind == "skewed" and len(change.inputs) == 1:
                    made = made[:1] + 0.05 * made
                if node in change.nonnegative:
                    made = made.abs()
            else:
                made = _ids(kind, dims, tokens, experts, generator)
            inputs[node] = made.to(example.dtype).to(example.device)
        yield inputs


def _ids(kind: str, dims: list[int], tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Ids, distinct within a token: one a token where there are as many, else (…, K)."""
    if math.prod(dims) != tokens:
        tokens = math.prod(dims[:-1])
    slots = math.prod(dims) // tokens
    available = experts if kind == "random" else max(slots, 1 if kind == "skewed" else experts // 2)
    ranks = torch.rand(tokens, min(available, experts), generator=generator).argsort(-1)
    return ranks[:, :slots].reshape(dims).contiguous()


def _op(new: Node) -> Node:
    node = new
    while node.target not in (ops.EXPERTS, ops.MOE):
        below = node.args[0]
        assert isinstance(below, Node), f"{new} holds no fused op"
        node = below
    return node


def _tokens(new: Node, sizes: Sizes) -> int:
    x = _op(new).args[0]
    assert isinstance(x, Node)
    return _number(shape(x)[0], sizes)


def _experts(new: Node) -> int:
    node = _op(new)
    text = str(node.args[-1])
    return (parse(text, ExpertsSpec) if node.target is ops.EXPERTS else parse(text, MoESpec).experts).count


@dataclass(frozen=True)
class _Run:
    """Runs part of a graph at small sizes, fused ops by stand-ins where both sides hold the same experts."""

    sizes: Sizes
    given: Given
    stand_ins: bool

    def value(self, result: Node, values: dict[Node, Any]) -> Tensor:
        """The value of `result`, computed from `values`."""
        for node in _between(tuple(values), (result,), self.given):
            if node in values:
                continue
            if _is_size(node, self.given):
                values[node] = _number(node.meta["val"], self.sizes)
            else:
                if (like := _likeness(node)) is not None and like not in values:
                    values[like] = self._of_sizes(like)
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._implementation(node)(*args, **kwargs)
        found = values[result]
        assert isinstance(found, Tensor)
        return found

    def _of_sizes(self, node: Node) -> Tensor:
        found = node.meta["val"]
        dims = [_number(size, self.sizes) for size in found.shape]
        return torch.empty(dims, dtype=found.dtype, device=found.device)

    def _implementation(self, node: Node) -> Callable[..., Any]:
        """A fused op may run in its gathered form, which has no loop over experts, where that is small."""
        assert callable(node.target)
        if not isinstance(node.target, torch._ops.OpOverload) or node.target not in STAND_INS:
            return node.target
        if self.stand_ins:
            return STAND_INS[node.target](str(_experts_tensors(node)))
        small = _gathered(node, self.sizes) <= _GATHERED
        return decompose.DECOMPOSITIONS[node.target] if small else node.target


def _experts_tensors(node: Node) -> list[Node]:
    """The expert tensors a fused op reads."""
    params = node.args[3 if node.target is ops.EXPERTS else 2]
    assert isinstance(params, (list, tuple))
    return [p for p in params if isinstance(p, Node)]


def _only_of_experts(tensor: Node, region: list[Node]) -> bool:
    """Whether a tensor is read in this region by fused ops alone, as one of their experts' tensors."""
    inside = [u for u in tensor.users if u in region]
    return all(
        tensor in _experts_tensors(u)
        if u.target in STAND_INS
        else u.target is ops.PACK and _only_of_experts(u, region)
        for u in inside
    )


def _contraction(graph: ProgramGraph, parameter: Node) -> int:
    return max(graph.tensor(parameter).shape[1:], default=1)


def _holds_nan(tensor: Tensor) -> bool:
    # One read at memory speed tells of most tensors that they hold none.
    return bool(tensor.is_floating_point() and tensor.sum().isnan() and tensor.isnan().any())
