"""Rules of dense routing weights: a (T, E) matrix with a token's weights at its ids, a number elsewhere.

    zeros.scatter(1, ids, w)                 w at the ids, 0 elsewhere
    (one_hot(ids, E) * w[..., None]).sum(1)  the same
    zeros.scatter(1, ids, 1.0) * scores      scores at the ids, 0 elsewhere
    dense / dense.sum(-1, keepdim=True)      still 0 elsewhere

Read as rows over (token, expert), the matrix is the leaf pair(w): where its number off the ids makes the
whole term vanish, every token for every expert says no more than the selected pairs do.
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, dtype, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.discover import require_distinct
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import Everywhere, Filled, MultiHot, OneHot, Rows, Value


def scatter(lift: Lift, node: Node) -> Value | None:
    """filled.scatter(1, ids, w): w at the ids."""
    base, ids, written = lift.of(node.args[0]), node.args[2], node.args[3]
    if node.target not in (aten.scatter.src, aten.scatter.value) or not isinstance(base, Filled):
        return None
    if len(shape(node)) != 2 or argument(node, "dim") not in (1, -1):
        return None
    experts = shape(node)[1]
    assert isinstance(ids, Node)
    if not isinstance(experts, int) or lift.of(ids) is not None:
        return None
    if not value(node).is_floating_point():
        return MultiHot(ids, experts) if base.number == 0 and written == 1 else None
    if isinstance(written, Node):
        if not is_tensor(written) or not lift.opaque(written) or not _same_shape(written, ids):
            return None
        source = PairSource(written, ids, fill=base.number)
    elif written == 1 and base.number == 0:
        source = PairSource(node, ids, matrix=True, mask=True, fill=0.0)
    else:
        return None
    require_distinct(ids)
    return Rows(Everywhere(experts, 1), lift.pair(source), 2, ())


def one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot(ids, E), of ids (T, K), of the flat pairs, or of one id a token."""
    ids, experts = node.args[0], argument(node, "num_classes")
    assert isinstance(ids, Node)
    if not isinstance(experts, int) or experts <= 0 or len(shape(ids)) > 2:
        return None
    if len(shape(ids)) == 2:
        root = lift.ids_root(ids)
        return OneHot(root[0] if root and _same_shape(root[0], ids) else ids, experts)
    root = lift.ids_root(ids)
    if root is None:
        return None
    return OneHot(root[0], experts, None, "TE" if len(shape(root[0])) == 1 else "PE")


def weigh_one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot (T, K, E) * w (T, K, 1)."""
    for hot_at, weight_at in ((0, 1), (1, 0)):
        hot, weight = lift.of(node.args[hot_at]), node.args[weight_at]
        if not isinstance(hot, OneHot) or hot.weight is not None or not isinstance(weight, Node):
            continue
        if hot.axes != "TKE":
            continue
        if weight.target is not aten.unsqueeze.default or not lift.opaque(weight.args[0]):
            continue
        below = weight.args[0]
        assert isinstance(below, Node)
        if argument(weight, "dim") in (2, -1) and _same_shape(below, hot.ids):
            return OneHot(hot.ids, hot.experts, below)
    return None


def sum_one_hot(lift: Lift, node: Node) -> Value | None:
    """The sum of a weighted one-hot over the slots."""
    hot = lift.of(node.args[0])
    if not isinstance(hot, OneHot) or hot.weight is None or argument(node, "keepdim"):
        return None
    if [d % 3 for d in argument(node, "dim") or []] != [1] or argument(node, "dtype") is not None:
        return None
    require_distinct(hot.ids)
    leaf = lift.pair(PairSource(hot.weight, hot.ids, fill=0.0))
    if dtype(node) != dtype(hot.weight):
        leaf = lift.terms.number("cast", (leaf,), (str(dtype(node)).removeprefix("torch."),))
    return Rows(Everywhere(hot.experts, 1), leaf, 2, ())


def scale_matrix(lift: Lift, node: Node) -> Value | None:
    """dense weights (T, E) · (T, 1), / (T, 1) or · (T, E): still 0 off the ids."""
    for dense_at, other_at in ((0, 1), (1, 0)):
        rows, other = lift.rows(node.args[dense_at]), node.args[other_at]
        if rows is None or rows.domain != Everywhere(_experts(rows), 1) or (rows.lead, rows.trail) != (2, ()):
            continue
        divides = operator_name(node) == "aten::div"
        if divides and (dense_at == 1 or argument(node, "rounding_mode")):
            continue
        source = _zero_filled(lift, rows)
        if source is None or not isinstance(other, Node) or not _scales(lift, other, node, divides):
            continue
        if (
            source.mask
            and not divides
            and _same_shape(other, node)
            and value(node).dtype == value(other).dtype
        ):
            return rows.like(lift.pair(PairSource(other, source.ids, matrix=True, fill=0.0)))
        return rows.like(lift.pair(PairSource(node, source.ids, matrix=True, fill=0.0)))
    return None


def _experts(rows: Rows) -> int:
    return rows.domain.experts if isinstance(rows.domain, Everywhere) else 0


def _zero_filled(lift: Lift, rows: Rows) -> PairSource | None:
    """The source of weights that are a leaf alone, cast or not, and 0 off the ids."""
    term = rows.term
    while lift.terms.steps[term].op == "cast":
        term = lift.terms.steps[term].args[0]
    leaf = lift.terms.steps[term]
    source = lift.sources[str(leaf.attrs[0])] if leaf.op == "pair" else None
    return source if source is not None and source.fill == 0 else None


def _scales(lift: Lift, other: Node, node: Node, divides: bool) -> bool:
    """An opaque floating value (T, 1), or (T, E) where it does not divide: 0 / 0 would be NaN off the ids."""
    if not is_tensor(other) or not value(other).is_floating_point() or len(shape(other)) != 2:
        return False
    if not same_size(shape(other)[0], shape(node)[0]) or not lift.opaque(other):
        return False
    return same_size(shape(other)[1], 1) or (not divides and _same_shape(other, node))


def _same_shape(a: Node, b: Node) -> bool:
    return len(shape(a)) == len(shape(b)) and all(map(same_size, shape(a), shape(b)))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::scatter": (scatter,),
    "aten::one_hot": (one_hot,),
    "aten::mul": (weigh_one_hot, scale_matrix),
    "aten::div": (scale_matrix,),
    "aten::sum": (sum_one_hot,),
}
