"""The forward walk: each node's meaning from its arguments' meanings, and where meaning was lost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from dsmoe_compiler.ir.body import Terms
from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    ProgramGraph,
    Size,
    alias_root,
    dtype,
    is_tensor,
    mutated_argument,
    same_size,
    shape,
    value,
)
from dsmoe_compiler.passes.lift.losses import Lost, ids_in, most_telling
from dsmoe_compiler.passes.lift.values import (
    Combined,
    DenseSum,
    Flags,
    Kept,
    KeptWeights,
    OneExpert,
    PartialRows,
    PartialSum,
    Rows,
    Value,
    Within,
)

SUMS = (PartialSum, DenseSum)
# Meanings that a value may have and still be a leaf.
_LEAVES = (Combined, PartialSum, DenseSum, Flags, KeptWeights, Within, NoneType)
Rule: TypeAlias = Callable[["Lift", Node], Value | None]


class Unproven(Exception):
    """A rule recognised the operator but could not prove what it needs; the layer is refused with this."""

    def __init__(self, code: str, because: str) -> None:
        super().__init__(because)
        self.code, self.because = code, because


class NotStatic(Exception):
    """A width that is not a number, so nothing a model's weights could meet: the rule does not apply."""


_KEEP_CONSTANT = frozenset(
    f"aten::{name}"
    for name in (
        *("select", "squeeze", "view", "reshape", "unsqueeze", "lift_fresh_copy", "lift_fresh", "detach"),
        *("detach_", "to", "_to_copy", "clone"),
    )
)
# Types of integers that hold any expert's number; a cast to one of the others may change it.
_WIDE = frozenset({torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True)
class PairSource:
    """Where a routing weight comes from: a (T, K) value, or a (T, E) matrix to be read at the ids.

    `fill` is what dense weights hold away from the ids, None if they are not; a `mask` holds 1 at them. A
    matrix that others were made into, by what keeps it 0 off the ids, was `made_of` one of them.
    """

    node: Node
    ids: Node | None = None
    matrix: bool = False
    mask: bool = False
    fill: float | None = None
    made_of: Node | None = None


@dataclass
class Lift:
    """One walk over one graph: meanings by node, terms, sources of weights, losses.

    `fixed` are the values computed from the model's own tensors alone, the same for every row; `own` holds
    the tensors of single experts, `packs` those that became one over all experts, `shared` those that all
    experts read; `sizes` says of a symbol that a count was read into which counts it sums, `counted` of which
    ids and how many experts; `written` are the tokens' rows that a loop wrote, each token having one id;
    `visited` the experts whose rows loops over some ids add; `numbers` have a meaning and are read as ids,
    too; `kept` are ids of which pairs were dropped, `restricted` the same by the ids before and the mask,
    `made` what values that the walk put into the graph were made of.
    """

    graph: ProgramGraph
    rules: Mapping[str, tuple[Rule, ...]]
    terms: Terms = field(default_factory=Terms)
    meaning: dict[Node, Value] = field(default_factory=dict)
    sources: dict[str, PairSource] = field(default_factory=dict)
    tokens: dict[str, Node] = field(default_factory=dict)
    params: dict[str, Node] = field(default_factory=dict)
    fixed: set[Node] = field(default_factory=set)
    own: dict[str, Node] = field(default_factory=dict)
    shared: dict[str, Node] = field(default_factory=dict)
    packs: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    sizes: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    counted: dict[Node, int] = field(default_factory=dict)
    losses: list[Lost] = field(default_factory=list)
    overwritten: set[Node] = field(default_factory=set)
    written: list[Node] = field(default_factory=list)
    visited: dict[Node, set[int]] = field(default_factory=dict)
    numbers: set[Node] = field(default_factory=set)
    kept: dict[Node, Kept] = field(default_factory=dict)
    restricted: dict[tuple[Node, object], Node] = field(default_factory=dict)
    made: dict[Node, tuple[Node, ...]] = field(default_factory=dict)

    def run(
        self, finish: Callable[[Lift, Node, PartialSum | DenseSum], Combined]
    ) -> list[tuple[Node, Combined]]:
        """Walk once, forward; returns every place where rows became tokens.

        `finish` says what a sum over visited experts means where nothing more is added to it.
        """
        nodes = self.graph.nodes
        self._find_fixed(nodes)
        self.overwritten = {alias_root(m) for n in nodes if (m := mutated_argument(n)) is not None}
        for node in nodes:
            if node.op == "call_function" and (found := self._interpret(node)) is not None:
                self.meaning[node] = found
        combined, whole = [], self._whole_rows()
        for node, found in list(self.meaning.items()):
            if isinstance(found, PartialRows) and not any(self._writes_on(u, node) for u in node.users):
                written = " and ".join(str(v.expert) for v in found.visits)
                self._lose(node, "R307", f"only rows of expert {written} are written, others can be chosen")
            if isinstance(found, SUMS) and not any(self._adds_to(u, node) for u in node.users):
                ids = found.ids
                try:
                    found = finish(self, node, found)
                except Unproven as e:
                    if not any(lost.ids is ids and not lost.silent for lost in self.losses):
                        self._lose(node, e.code, e.because)
            if node in whole and isinstance(found, Rows):
                found = Combined(found)
            if isinstance(found, Combined):
                combined.append((node, found))
        return combined

    def _find_fixed(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            inputs = node.all_input_nodes
            computed = node.op == "call_function" and inputs and all(i in self.fixed for i in inputs)
            if computed or self.graph.parameter(node) is not None:
                self.fixed.add(node)

    def _whole_rows(self) -> set[Node]:
        """Where each token has one id and a loop wrote all rows: the last values that are still rows."""
        reached, last = set[Node](), set[Node]()
        stack = list(self.written)
        while stack:
            node = stack.pop()
            further = [u for u in node.users if isinstance(self.meaning.get(u), Rows)]
            if not further and all(not isinstance(self.meaning.get(u), Combined) for u in node.users):
                last.add(node)
            stack += [u for u in further if u not in reached]
            reached.update(further)
        return last

    def _writes_on(self, user: Node, node: Node) -> bool:
        return user.args[0] is node and isinstance(self.meaning.get(user), (PartialRows, Rows))

    def _adds_to(self, user: Node, node: Node) -> bool:
        return node in user.all_input_nodes and isinstance(self.meaning.get(user), SUMS)

    def _interpret(self, node: Node) -> Value | None:
        known = [v for a in node.all_input_nodes if (v := self.meaning.get(a)) is not None]
        if self.overwritten and is_tensor(node) and alias_root(node) in self.overwritten:
            if known:
                self._lose(node, "R408", "it is overwritten in place while another name still reads it")
            return None
        try:
            for rule in self.rules.get(operator_name(node), ()):
                if (found := rule(self, node)) is not None:
                    return found
        except Unproven as e:
            self._lose(node, e.code, e.because)
            return None
        except NotStatic:
            silent = True
        else:
            silent = not is_tensor(node) or not any(map(self._is_of_experts, known))
        if known and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            self._lose(node, "R301", "", silent)
        return None

    def supposing(self, source: Node, meaning: Value, nodes: Sequence[Node]) -> Value | None:
        """What the last of some nodes would mean, read in their order, if `source` had this meaning."""
        before = {node: self.meaning.get(node) for node in (source, *nodes)}
        self.meaning[source] = meaning
        for node in nodes:
            if (found := self._interpret(node)) is not None:
                self.meaning[node] = found
        result = self.meaning.get(nodes[-1])
        for node, old in before.items():
            if old is None:
                self.meaning.pop(node, None)
            else:
                self.meaning[node] = old
        return result

    def _is_of_experts(self, found: Value) -> bool:
        if not isinstance(found, Rows):
            return False
        own = ("token", "expert", "own") if isinstance(found.domain, OneExpert) else ("expert", "own")
        return any(self.terms.leaves(found.term, leaf) for leaf in own)

    def _lose(self, node: Node, code: str, because: str, silent: bool = False) -> None:
        """Write down that meaning ends at a node; with no reason, that no rule knows its operator."""
        own = self.meaning.get(node)
        known = [(a, v) for a in node.all_input_nodes if (v := self.meaning.get(a)) is not None]
        last = (node, own) if own is not None else most_telling(known)
        if last is not None or not silent:
            ids = next((i for _, v in known if (i := ids_in(v)) is not None), ids_in(own))
            self.losses.append(Lost(ids, node, code, because, last, silent))

    # -- what rules ask --------------------------------------------------------------------------------------

    def rows(self, node: object) -> Rows | None:
        """The node's meaning if it is rows."""
        found = self.meaning.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Rows) else None

    def of(self, node: object) -> Value | None:
        """The node's meaning."""
        return self.meaning.get(node) if isinstance(node, Node) else None

    def make(
        self, op: torch._ops.OpOverload, args: tuple[Argument, ...], val: Tensor, of: tuple[Node, ...]
    ) -> Node:
        """A new value of the graph, right after what it reads, made of `of`; erased after the pass if nobody
        comes to read it.
        """
        read = list[Node]()
        map_arg(args, read.append)
        after = max(read)
        with self.graph.graph.inserting_after(after):
            made = self.graph.graph.call_function(op, args)
        made.meta = {**after.meta, "val": val}
        self.made[made] = of
        return made

    def opaque(self, node: object) -> bool:
        """A tensor of the program that has no meaning yet and is no parameter: a possible leaf.

        Raises Unproven where it is overwritten: the fused op would read it later than the model does.
        """
        if not isinstance(node, Node) or not is_tensor(node):
            return False
        stacked = self.expert_parameter(node)
        if stacked is not None and self.graph.parameter(stacked[0]) is not None:
            return False
        if not isinstance(self.of(node), _LEAVES):
            return False
        self.require_unwritten(node)
        return True

    def require_unwritten(self, node: Node) -> None:
        if self.overwritten and alias_root(node) in self.overwritten:
            raise Unproven("R408", f"the layer reads %{node.name}, which is overwritten in place")

    def token(self, node: Node) -> int:
        """The leaf x[token], x being `node` (T, D)."""
        self.tokens[node.name] = node
        return self.terms.number("token", (), (node.name,))

    def pair(self, source: PairSource) -> int:
        """The leaf v[pair]: one for each way to read a value, as it may be read at several ids."""
        name = source.node.name
        if source.ids is not None:
            name += f"[:, {source.ids.name}]" if source.matrix else f" of {source.ids.name}"
            name += f"{' where chosen' * source.mask}, else {source.fill}"
        self.sources[name] = source
        return self.terms.number("pair", (), (name,))

    def expert(self, parameter: Node) -> int:
        """The leaf P[expert], P being the whole parameter, E first."""
        self.require_unwritten(parameter)
        self.params[parameter.name] = parameter
        return self.terms.number("expert", (), (parameter.name,))

    def expert_parameter(self, node: object, rank: int = 2) -> tuple[Node, bool] | None:
        """(parameter, whether its last two dimensions are swapped) under transposes and copies.

        What the model computes from its own tensors alone (a view of a flat one, a part of a chunk, a cast)
        is as good as a parameter.
        """
        flipped = False
        while isinstance(node, Node) and node.op == "call_function":
            if not node.args or not is_tensor(node.args[0]):
                break
            if node.target in COPIES:
                pass
            elif _swaps_last_two(node):
                flipped = not flipped
            else:
                break
            node = node.args[0]
        if not isinstance(node, Node) or not is_tensor(node) or len(shape(node)) < rank:
            return None
        computed = node in self.fixed and value(node).is_floating_point()
        return (node, flipped) if computed or self.graph.parameter(node) is not None else None

    def share(self, node: Node) -> int:
        """The leaf S, a value of the model's own tensors alone that all experts read."""
        self.require_unwritten(node)
        self.shared[node.name] = node
        return self.terms.number("shared", (), (node.name,))

    def pack(self, parts: tuple[Node, ...]) -> int:
        """The leaf P[expert], P being the experts' own tensors, one after the other."""
        name = next((n for n, known in self.packs.items() if known == parts), f"pack {len(self.packs)}")
        self.packs[name] = parts
        return self.terms.number("expert", (), (name,))

    def own_parameter(self, node: object, expert: int) -> tuple[int, tuple[int, ...], bool] | None:
        """(leaf, shape, whether its two dimensions are swapped) of one expert's tensor: a parameter of its
        own, what is computed from such alone, or its entry of a stacked one. None where it is neither.

        Raises Unproven where it is the entry of another expert.
        """
        flipped = False
        while isinstance(node, Node) and node.op == "call_function":
            if not node.args or not is_tensor(node.args[0]):
                return None
            if node.target in COPIES:
                node = node.args[0]
            elif is_tensor(node) and len(shape(node)) == 2 and _swaps_last_two(node):
                flipped, node = not flipped, node.args[0]
            else:
                break
        if not isinstance(node, Node) or not is_tensor(node) or not value(node).is_floating_point():
            return None
        sizes = shape(node)
        if len(sizes) > 2 or not all(isinstance(s, int) for s in sizes):
            return None
        static = tuple(int(s) for s in sizes)
        if (entry := self._entry(node, expert, static, flipped)) is not None:
            return entry
        if node not in self.fixed:
            return None
        self.require_unwritten(node)
        self.own[node.name] = node
        return self.terms.number("own", (), (node.name,)), static, flipped

    def _entry(
        self, node: Node, expert: int, sizes: tuple[int, ...], flipped: bool
    ) -> tuple[int, tuple[int, ...], bool] | None:
        """The leaf of P[e], by select or as a part of what unbind gives."""
        picked, index = node, None
        if operator_name(node) == "getitem":
            picked, index = node.all_input_nodes[0], node.args[1]
        name = operator_name(picked)
        if name != ("aten::select" if index is None else "aten::unbind") or argument(picked, "dim") != 0:
            return None
        stacked = self.expert_parameter(picked.args[0], rank=1)
        if stacked is None:
            return None
        parameter, swapped = stacked
        chosen = argument(picked, "index") if index is None else index
        if not isinstance(chosen, int):
            return None
        chosen %= int(shape(parameter)[0])
        if chosen != expert:
            raise Unproven("R302", f"the rows of expert {expert} meet the weights of expert {chosen}")
        return self.expert(parameter), sizes, flipped != (swapped and len(sizes) == 2)

    def constant(self, node: object) -> int | None:
        """An integer the graph holds, as a number or as a constant tensor of one element."""
        if isinstance(node, int) and not isinstance(node, bool):
            return node
        while isinstance(node, Node) and node.op == "call_function":
            if operator_name(node) not in _KEEP_CONSTANT or not is_tensor(node) or value(node).numel() != 1:
                return None
            node = node.args[0]
        if not isinstance(node, Node) or self.graph.constant(node) is None:
            return None
        tensor = self.graph.tensor(node)
        return int(tensor) if tensor.numel() == 1 and tensor.dtype in _WIDE and not tensor.is_meta else None

    def extent(self, size: object) -> sympy.Expr:
        """A size as an expression in counts of experts' pairs where it was read from such."""
        found = value(size) if isinstance(size, Node) else size
        if isinstance(found, torch.SymInt):
            return found.node.expr.xreplace(self.sizes)
        return sympy.Integer(found)

    def counts_every_pair(self, size: object, ids: Node) -> bool:
        """Whether a size is the sum of how many pairs chose each expert."""
        experts = range(self.counted.get(ids, 0))
        return bool(self.extent(size) == sympy.Add(*(count_of(ids, e) for e in experts))) and bool(experts)

    def ids_root(self, node: Node) -> tuple[Node, int] | None:
        """(ids (…, K), K) under integers of any shape; K is the static size of the ids' last dimension."""
        if not _holds_ids(node) or (self.of(node) is not None and node not in self.numbers):
            return None
        self.require_unwritten(node)
        while node.op == "call_function":
            below = node.args[0] if node.args else None
            if not isinstance(below, Node) or not _holds_ids(below):
                break
            flattens = node.target in VIEWS and len(shape(node)) == 1
            if not (flattens or node.target in CASTS | COPIES):
                break
            node = below
        slots = shape(node)[-1] if has_slots(node) else 1
        return (node, slots) if isinstance(slots, int) else None


def count_of(ids: Node, expert: int) -> sympy.Symbol:
    """The symbol for how many pairs of `ids` chose an expert."""
    return _count_symbol(ids.name, expert)


@functools.lru_cache(maxsize=4096)
def _count_symbol(ids: str, expert: int) -> sympy.Symbol:
    return sympy.Symbol(f"count({ids},{expert})", integer=True, nonnegative=True)


def row_base(node: Node) -> Node:
    """The value under reshapes that keep the last dimension, so the same rows in the same order."""
    while node.op == "call_function" and node.target in VIEWS | COPIES:
        below = node.args[0]
        if not isinstance(below, Node) or not is_tensor(below) or not shape(below) or not shape(node):
            break
        if not same_size(shape(below)[-1], shape(node)[-1]):
            break
        node = below
    return node


def uncast_rows(node: Node) -> Node:
    """The value under casts, too."""
    while (base := row_base(node)).target in CASTS and isinstance(base.args[0], Node):
        node = base.args[0]
    return base


def _holds_ids(node: Node) -> bool:
    return is_tensor(node) and dtype(node) in _WIDE


_SAME_DIMENSIONS = frozenset(
    f"aten::{name}"
    for name in (
        *("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "remainder", "clamp"),
        *("masked_fill", "where"),
    )
)


def has_slots(ids: Node) -> bool:
    """Whether the ids' last dimension numbers a token's slots.

    An argmax drops that dimension, a top-k has one: what selects says so. Of sizes only one that varies says
    something: as many slots as a token has are a number.
    """
    return _numbers_slots(ids) and (len(shape(ids)) < 2 or isinstance(shape(ids)[-1], int))


def _numbers_slots(ids: Node) -> bool:
    """Whether what selects says so, or nothing says otherwise."""
    while len(shape(ids)) > 1 and ids.op == "call_function":
        name, last = operator_name(ids), len(shape(ids)) - 1
        if name in ("aten::argmax", "aten::argmin"):
            return bool(argument(ids, "keepdim"))
        if name == "getitem":
            selector = ids.all_input_nodes[0]
            if operator_name(selector) == "aten::unbind":
                return argument(selector, "dim") not in (-1, last + 1)
            return operator_name(selector) != "aten::max" or bool(argument(selector, "keepdim"))
        below = ids.args[1] if name == "aten::where" and len(ids.args) == 3 else ids.args[0]
        if not isinstance(below, Node) or not is_tensor(below):
            return True
        if name in ("aten::select", "aten::squeeze") and len(shape(below)) == last + 2:
            return argument(ids, "dim") not in (-1, last + 1, [-1], [last + 1])
        if ids.target in VIEWS:
            return _numbers_slots(below) or same_size(shape(ids)[-1], 1)
        if name not in _SAME_DIMENSIONS:
            return True
        ids = below
    return len(shape(ids)) > 1


def static(sizes: Sequence[Size]) -> tuple[int, ...]:
    """Sizes as numbers. Raises NotStatic where one varies."""
    if not all(isinstance(s, int) for s in sizes):
        raise NotStatic
    return tuple(int(s) for s in sizes)


def operator_name(node: Node) -> str:
    """ "aten::sort", without the overload; Python's own operators by their name."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema's name, however it was passed."""
    formals = node.target._schema.arguments  # type: ignore[union-attr]
    for i, formal in enumerate(formals):
        if formal.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, formal.default_value)
    return default


def _swaps_last_two(node: Node) -> bool:
    below = node.args[0]
    assert isinstance(below, Node)
    rank = len(shape(below))
    match operator_name(node):
        case "aten::transpose":
            dims = {d % rank for d in node.args[1:3] if isinstance(d, int)}
            return dims == {rank - 1, rank - 2}
        case "aten::permute":
            order = [d % rank for d in argument(node, "dims")]
            return order == [*range(rank - 2), rank - 1, rank - 2]
        case "aten::mT":
            return True
        case "aten::t" | "aten::numpy_T":
            return rank == 2
    return False
