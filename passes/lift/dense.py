"""Rules of dense routing weights: a (T, E) matrix that holds each token's weights at its ids and a known number elsewhere.

    zeros.scatter(1, ids, w)                 w at the ids, 0 elsewhere
    (one_hot(ids, E) * w[..., None]).sum(1)  the same
    zeros.scatter(1, ids, 1.0) * scores      scores at the ids, 0 elsewhere

Read as rows over (token, expert), the matrix is the leaf pair(w): where its number off the ids makes the whole term
vanish, every token for every expert says no more than the selected pairs do.
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import aten, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.state import Lift, PairSource, Rule, Unproven, argument
from dsmoe_compiler.passes.lift.values import Everywhere, Filled, OneHot, Rows, Value


def scatter(lift: Lift, node: Node) -> Value | None:
    """filled.scatter(1, ids, w): w at the ids."""
    base, ids, written = lift.of(node.args[0]), node.args[2], node.args[3]
    if not isinstance(base, Filled) or len(shape(node)) != 2 or argument(node, "dim") not in (1, -1):
        return None
    experts = shape(node)[1]
    assert isinstance(ids, Node)
    if not isinstance(experts, int) or lift.of(ids) is not None or not value(node).is_floating_point():
        return None
    if isinstance(written, Node):
        if not is_tensor(written) or not lift.opaque(written) or not _same_shape(written, ids):
            return None
        source = PairSource(written, ids, fill=base.number)
    elif written == 1 and base.number == 0:
        source = PairSource(node, ids, matrix=True, fill=0.0)
    else:
        return None
    _require_distinct(ids)
    return Rows(Everywhere(experts, 1), lift.pair(source), 2, ())


def one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot(ids (T, K), E)."""
    ids, experts = node.args[0], argument(node, "num_classes")
    assert isinstance(ids, Node)
    return OneHot(ids, experts) if len(shape(ids)) == 2 and isinstance(experts, int) and experts > 0 else None


def weigh_one_hot(lift: Lift, node: Node) -> Value | None:
    """one_hot (T, K, E) * w (T, K, 1)."""
    for hot_at, weight_at in ((0, 1), (1, 0)):
        hot, weight = lift.of(node.args[hot_at]), node.args[weight_at]
        if not isinstance(hot, OneHot) or hot.weight is not None or not isinstance(weight, Node):
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
    if [d % 3 for d in argument(node, "dim")] != [1]:
        return None
    _require_distinct(hot.ids)
    leaf = lift.pair(PairSource(hot.weight, hot.ids, fill=0.0))
    return Rows(Everywhere(hot.experts, 1), leaf, 2, ())


def _same_shape(a: Node, b: Node) -> bool:
    return len(shape(a)) == len(shape(b)) and all(map(same_size, shape(a), shape(b)))


def _require_distinct(ids: Node) -> None:
    """The ids of a token differ: they are the indices of a top-k, or there is one."""
    if same_size(shape(ids)[-1], 1):
        return
    top = ids.args[0] if ids.op == "call_function" and ids.args else None
    picked = isinstance(top, Node) and top.target is aten.topk.default and ids.args[1] == 1
    if not picked:
        raise Unproven("R404", "the ids written into the dense weights may repeat within a token: they are no top-k")


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::scatter": (scatter,),
    "aten::one_hot": (one_hot,),
    "aten::mul": (weigh_one_hot,),
    "aten::sum": (sum_one_hot,),
}
