"""Make the captured graph functional and plain, in place and in linear time.

What lifting reads must have one meaning, so an in-place operator becomes its functional twin wherever no
other name reads the overwritten memory afterwards; casts and copies that change nothing disappear; equal
views become one node. Retracing the program would do the same at more than the price of the capture itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    ProgramGraph,
    alias_root,
    aliased_argument,
    aten,
    dtype,
    erase_dead,
    is_tensor,
    mutated_argument,
    same_sizes,
    shape,
    through,
    value,
)
from dsmoe_compiler.ir.passes import PassLog
from dsmoe_compiler.passes.lift.ranges import Bounds, bounds
from dsmoe_compiler.passes.lift.state import argument, operator_name

_SIZES = frozenset({aten.sym_size.int, operator.mul, operator.add, operator.sub, operator.floordiv})
_REARRANGE = frozenset(
    {aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.t.default}
)
_WHOLE = 2**62  # a slice's stop at or past this means "to the end"
_WIDEN = frozenset({aten.unsqueeze.default, aten.expand.default})
_CLAMPS, _ENDS = ("aten::clamp", "aten::clamp_min", "aten::clamp_max"), ("min", "max")
_NOTHING = frozenset({aten.lift_fresh.default, aten.alias.default})
_MOVES = frozenset({"index", "indices", "mask", "src", "source"})  # operators that take these compute nothing
_DETACH = frozenset({aten.detach.default, aten.detach_.default})


@dataclass(frozen=True)
class Normalize:
    """Functional, without assertions that hold by construction, without copies that copy nothing.

    before:
        %1 = topk(%0, 2)
        %2 = getitem(%1, 0)
        %3 = div_(%2, 2.0)
        %4 = to(%3, float32)
    after:
        %1 = topk(%0, 2)
        %2 = getitem(%1, 0)
        %3 = div(%2, 2.0)
    """

    name: ClassVar[str] = "normalize"

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        """Returns whether anything changed."""
        before = len(graph.nodes)
        changed = _drop_metadata_assertions(graph)
        changed += _pin_sizes(graph)
        changed += _make_functional(graph)
        changed += _reshape(graph)
        changed += _drop_sentinels(graph)
        changed += _drop_copies(graph)
        changed += _merge_equal(graph)
        erase_dead(graph.graph)
        return bool(changed) or len(graph.nodes) != before


def _drop_metadata_assertions(graph: ProgramGraph) -> int:
    """dtype and device were checked when the program was captured and are checked again at its inputs."""
    found = [n for n in graph.nodes if n.target is aten._assert_tensor_metadata.default]
    for node in found:
        graph.graph.erase_node(node)
    return len(found)


def _pin_sizes(graph: ProgramGraph) -> int:
    """Sizes that tracing pinned to a number (K, where ids are an input) are that number."""
    changed = 0
    for node in graph.nodes:
        size = node.meta.get("val")
        if node.target is not aten.sym_size.int or not isinstance(size, (int, torch.SymInt)):
            continue
        number = size if isinstance(size, int) else size.node.expr
        if isinstance(number, int) or number.is_Integer:
            for user in list(node.users):
                _put_number(user, node, int(number))
            changed += 1
    return changed


def _put_number(user: Node, size: Node, number: int) -> None:
    def put(node: Node) -> Argument:
        return number if node is size else node

    user.args, user.kwargs = map_arg(user.args, put), map_arg(user.kwargs, put)


def _make_functional(graph: ProgramGraph) -> int:
    position = {n: i for i, n in enumerate(graph.graph.nodes)}
    family: dict[Node, list[Node]] = {}
    for node in position:
        family.setdefault(alias_root(node), []).append(node)
    changed = 0
    for node in list(position):
        overwritten = mutated_argument(node)
        twin = _functional_twin(node)
        if overwritten is None or twin is None or overwritten is not node.args[0]:
            continue
        root = alias_root(overwritten)
        if root.op != "call_function" or _read_later(family.get(root, [root]), overwritten, node, position):
            continue
        replacement = _insert_twin(graph, node, twin, overwritten)
        position[replacement] = position[node]
        later = [m for m in family.get(root, []) if position[m] > position[node]]
        family[alias_root(replacement)] = [replacement, *later]
        for user in [u for u in overwritten.users if position.get(u, -1) > position[node]]:
            user.replace_input_with(overwritten, replacement)
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)
        changed += 1
    return changed


def _read_later(family: list[Node], overwritten: Node, at: Node, position: dict[Node, int]) -> bool:
    """Whether another name for the overwritten memory, made before `at`, is read after it."""
    return any(
        position[user] > position[at]
        for other in family
        if other is not overwritten and other is not at and position[other] < position[at]
        for user in other.users
        if user in position
    )


def _functional_twin(node: Node) -> torch._ops.OpOverload | None:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
    twin = getattr(packet, node.target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    same = [a.name for a in twin._schema.arguments] == [a.name for a in node.target._schema.arguments]
    return twin if same else None


def _insert_twin(graph: ProgramGraph, node: Node, twin: torch._ops.OpOverload, overwritten: Node) -> Node:
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(twin, node.args, node.kwargs)
        made.meta = dict(node.meta)
        if (promoted := _promoted(twin, node)) != dtype(overwritten):
            made.meta["val"] = value(node).to(promoted)
            made = graph.graph.call_function(aten.to.dtype, (made, dtype(overwritten)))
            made.meta = dict(node.meta)
    return made


def _promoted(twin: torch._ops.OpOverload, node: Node) -> torch.dtype:
    """The dtype of what the twin computes; in place, the overwritten value keeps its own."""
    own = value(node).dtype
    if _MOVES & {a.name for a in twin._schema.arguments}:
        return own  # type: ignore[no-any-return]
    found = own
    for other in node.args[1:]:
        if isinstance(other, Node) and is_tensor(other):
            found = torch.promote_types(found, torch.result_type(value(node), value(other)))
    return found  # type: ignore[no-any-return]


def _reshape(graph: ProgramGraph) -> int:
    """unflatten(x, dim, sizes) is a reshape, where no more than one size varies."""
    changed = 0
    for node in [n for n in graph.nodes if n.target is aten.unflatten.int]:
        sizes = [size if isinstance(size, int) else -1 for size in shape(node)]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], sizes), {}
        changed += 1
    return changed


def _drop_sentinels(graph: ProgramGraph) -> int:
    """Ids of a top-k are those of experts: what is done to larger ones, sentinels of experts elsewhere, is
    done to nobody.
    """
    changed = 0
    written = {alias_root(m) for n in graph.nodes if (m := mutated_argument(n)) is not None}
    for node in graph.nodes:
        below = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(below, Node) or alias_root(below) in written or not _same_kind(node, below):
            continue
        name = operator_name(node)
        clamps = name in _CLAMPS and _within(bounds(graph, below), *(argument(node, a, None) for a in _ENDS))
        if clamps or (name == "aten::masked_fill" and _holds_nowhere(graph, node.args[1])):
            node.replace_all_uses_with(below)
            graph.graph.erase_node(node)
            changed += 1
    return changed


def _same_kind(a: Node, b: Node) -> bool:
    return is_tensor(a) and is_tensor(b) and dtype(a) == dtype(b) and same_sizes(shape(a), shape(b))


def _within(found: Bounds, least: object, largest: object) -> bool:
    """Whether bounds that are known lie between ends that are numbers or open."""
    low, high = found
    above = least is None or isinstance(least, int) and low is not None and low >= least
    return above and (largest is None or isinstance(largest, int) and high is not None and high <= largest)


def _holds_nowhere(graph: ProgramGraph, mask: object) -> bool:
    """Whether a mask says "at least n" of integers that are all less."""
    if isinstance(mask, Node):
        mask = through(mask, VIEWS | _WIDEN)
    if not isinstance(mask, Node) or operator_name(mask) not in ("aten::ge", "aten::gt"):
        return False
    number = mask.args[1]
    if not isinstance(number, int):
        return False
    _, high = bounds(graph, mask.args[0])
    return high is not None and high < number + (operator_name(mask) == "aten::gt")


def _drop_copies(graph: ProgramGraph) -> int:
    changed = 0
    written = {alias_root(m) for n in graph.nodes if (m := mutated_argument(n)) is not None}
    for node in graph.nodes:
        if node.op != "call_function" or not node.args or not is_tensor(node.args[0]) or not is_tensor(node):
            continue
        below = node.args[0]
        assert isinstance(below, Node)
        if alias_root(node) in written or alias_root(below) in written:
            continue
        if node.target in _DETACH and dtype(node).is_floating_point:
            continue  # it changes no value, but gradients stop there
        if _is_copy(node) and _is_returned(node):
            continue  # the caller may write into it
        plain = (
            node.target in _NOTHING | _DETACH
            or _is_whole(node)
            or (
                node.target in CASTS | COPIES
                and dtype(node) == dtype(below)
                and node.meta["val"].device == below.meta["val"].device
                and (
                    node.target not in COPIES
                    or str(node.meta["val"].stride()) == str(below.meta["val"].stride())
                )
            )
        )
        if plain:
            node.replace_all_uses_with(below)
            graph.graph.erase_node(node)
            changed += 1
    return changed


def _is_whole(node: Node) -> bool:
    """x[:]"""
    if node.target is not aten.slice.Tensor:
        return False
    start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
    return start in (None, 0) and step == 1 and (stop is None or (isinstance(stop, int) and stop >= _WHOLE))


def _is_copy(node: Node) -> bool:
    """Whether a node's value has memory of its own though it equals its input."""
    copies = argument(node, "copy", False) if node.target is aten.to.dtype else False
    return node.target in (aten.clone.default, aten._to_copy.default) or bool(copies)


def _is_returned(node: Node) -> bool:
    """Whether the program returns the value or a view of it."""
    return any(u.op == "output" or (aliased_argument(u) is node and _is_returned(u)) for u in node.users)


def _merge_equal(graph: ProgramGraph) -> int:
    """One node for equal views, casts and sizes, so that equal values are equal nodes."""
    seen: dict[tuple[object, ...], Node] = {}
    mergeable = VIEWS | CASTS | _SIZES | _REARRANGE
    written = {alias_root(m) for n in graph.nodes if (m := mutated_argument(n)) is not None}
    changed = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in mergeable or alias_root(node) in written:
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        own_memory = node.target in CASTS and _is_returned(node)
        if first is not node and not own_memory:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
            changed += 1
    return changed


def _frozen(argument: Argument) -> object:
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(a) for a in argument)
    return (type(argument).__name__, argument)
