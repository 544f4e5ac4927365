"""Rules of gathered weights that meet their tokens by broadcasting or by einsum.

einsum("td,tkfd->tkf", x, P[ids])      one token with each of its K matrices
einsum("tkf,tkdf->tkd", rows, P[ids])   each pair's row with its own matrix
P[ids] @ x[:, None, :, None]           the first, by broadcasting
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import COPIES, VIEWS, Size, aten, is_tensor, same_size, shape, value
from dsmoe_compiler.passes.lift.product import of_gathered
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument
from dsmoe_compiler.passes.lift.values import Pairs, Rows, Value

_REARRANGES = VIEWS | COPIES | {aten.unsqueeze.default}


def einsum(lift: Lift, node: Node) -> Value | None:
    """einsum of gathered matrices with tokens or with the pairs' rows; the result's width comes last."""
    inputs, arrow, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    names, operands = inputs.split(","), argument(node, "tensors")
    found = [lift.rows(operand) for operand in operands]
    at = next((i for i, rows in enumerate(found) if rows is not None and rows.is_matrix), None)
    if at is None or len(operands) != 2 or not arrow:
        return None
    matrix, rows, many, few = found[at], found[1 - at], names[at], names[1 - at]
    assert matrix is not None
    pairs, wide = many[: matrix.lead], many[matrix.lead :]
    if not _own_order(matrix) or len(set(many)) != len(many) or len(wide) != 2:
        return None
    inner = few[-1]
    outer = wide[0] if inner == wide[1] else wide[1]
    if inner not in wide or out != pairs + outer:
        return None
    if rows is None and few == pairs[:-1] + inner and matrix.lead > 1:
        rows = _of_tokens(lift, operands[1 - at], operands[at], matrix)
    elif few != pairs + inner:
        return None
    if rows is None or len(rows.trail) != 1 or not _same(lift, operands, node, matrix.lead - 1):
        return None
    column = inner == wide[1]
    product = of_gathered(lift, matrix, rows.like(rows.term, _across(rows.width, column)), column=column)
    return None if product is None else product.like(product.term, (product.width,))


def broadcast(lift: Lift, node: Node) -> Value | None:
    """P[ids] @ x as (T, 1, D, 1), x as (T, 1, 1, D) @ P[ids]: one token for all of its matrices."""
    for at in (0, 1):
        matrix, x = lift.rows(node.args[at]), node.args[1 - at]
        if matrix is None or not matrix.is_matrix or not isinstance(x, Node) or lift.of(x) is not None:
            continue
        gathered = node.args[at]
        assert isinstance(gathered, Node)
        if not _own_order(matrix) or len(shape(x)) != matrix.lead + 2:
            return None
        sizes = shape(x)
        one_token = matrix.lead == 1 and isinstance(matrix.domain, Pairs) and matrix.domain.slots == 1
        if not one_token and (matrix.lead == 1 or not same_size(sizes[matrix.lead - 1], 1)):
            return None
        width, one = (sizes[-2], sizes[-1]) if at == 0 else (sizes[-1], sizes[-2])
        tokens = sizes[: matrix.lead] if one_token else sizes[: matrix.lead - 1]
        if not same_size(one, 1) or not isinstance(width, int):
            return None
        if not all(map(same_size, tokens, shape(gathered))):
            return None
        base = _base(x, (*tokens, width))
        if base is None or not lift.opaque(base) or not value(base).is_floating_point():
            return None
        rows = Rows(matrix.domain, lift.token(base), matrix.lead, _across(width, at == 0))
        return of_gathered(lift, matrix, rows, column=at == 0)
    return None


def _of_tokens(lift: Lift, x: Node, gathered: Node, matrix: Rows) -> Rows | None:
    """x (T, D) as rows of the pairs that the gathered (T, K, …) matrices are of."""
    if not lift.opaque(x) or not value(x).is_floating_point() or len(shape(x)) != matrix.lead:
        return None
    *tokens, width = shape(x)
    if not isinstance(width, int) or not all(map(same_size, tokens, shape(gathered))):
        return None
    return Rows(matrix.domain, lift.token(x), matrix.lead, (width,))


def _own_order(matrix: Rows) -> bool:
    """Whether matrices are those of the pairs in their own order, so that tokens lie beside theirs."""
    return isinstance(matrix.domain, Pairs) and matrix.domain.order is None


def _across(width: int, column: bool) -> tuple[int, int]:
    return (width, 1) if column else (1, width)


def _base(node: Node, sizes: tuple[Size, ...]) -> Node | None:
    """The value of these sizes under views that add dimensions of size 1."""
    while node.target in _REARRANGES:
        own = shape(node)
        if len(own) == len(sizes) and all(map(same_size, own, sizes)):
            return node
        below = node.args[0]
        if not isinstance(below, Node) or not is_tensor(below) or _wide(below) != _wide(node):
            return None
        node = below
    own = shape(node)
    return node if len(own) == len(sizes) and all(map(same_size, own, sizes)) else None


def _wide(node: Node) -> list[str]:
    return [str(size) for size in shape(node) if not same_size(size, 1)]


def _same(lift: Lift, operands: list[Node], node: Node, lead: int) -> bool:
    """Whether no operand's rows are repeated: einsum stretches a dimension of size 1."""
    return all(all(map(same_size, shape(o)[:lead], shape(node)[:lead])) for o in operands)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::einsum": (einsum,),
    "aten::matmul": (broadcast,),
    "aten::bmm": (broadcast,),
}
