"""The names of dimensions of a mask or a one-hot: T tokens, K slots, P pairs, E experts, 1 one of size 1.

Tokens that a model keeps apart, as a batch and its positions, have a letter each, "BS": these are the ids'
own token dimensions. What a rule relies on is the order of rows, which is that of the flattened tokens; so it
asks for the names with the tokens' own as one "T", and a dimension of size 1 changes nothing.
"""

from __future__ import annotations

from torch.fx import Node

from dsmoe_compiler.ir.graph import Size, same_size, shape
from dsmoe_compiler.passes.lift.state import has_slots

_APART = "BSUVW"  # the names of two and more token dimensions


def token_sizes(ids: Node) -> tuple[Size, ...]:
    """The ids' sizes without that of the slots."""
    sizes = shape(ids)
    return sizes[:-1] if has_slots(ids) else sizes


def count_tokens(ids: Node) -> Size:
    """T."""
    tokens: Size = 1
    for size in token_sizes(ids):
        tokens = tokens * size
    return tokens


def token_axes(ids: Node) -> str:
    """ "T", or the names of the ids' own token dimensions where they have several."""
    rank = len(token_sizes(ids))
    return "T" if rank == 1 else _APART[:rank]


def pair_axes(ids: Node) -> str:
    """The names of the ids' own dimensions."""
    return token_axes(ids) + ("K" if has_slots(ids) else "")


def order_of(axes: str, ids: Node) -> str:
    """The names with the tokens' own as one "T" and without the sizes of 1: what rows are listed by."""
    own = token_axes(ids)
    return axes.replace("1", "").replace(own, "T")


def viewed(axes: str, ids: Node, slots: int, old: tuple[Size, ...], new: tuple[Size, ...]) -> str | None:
    """The names after a view from `old` sizes to `new`, which joins the tokens' dimensions, or adds and drops
    dimensions of size 1; None where it does anything else.
    """
    if len(old) == len(new) and all(map(same_size, old, new)):
        return axes
    own, tokens, names = token_axes(ids), count_tokens(ids), ""
    left = order_of(axes, ids).replace("P", "TK").replace("T", own)
    left = left.replace("K", "") if slots == 1 else left
    sizes = {**dict(zip(axes, old, strict=True)), **dict(zip(own, token_sizes(ids), strict=True)), "K": slots}
    for size in new:
        if same_size(size, 1):
            names += "1"
        elif left.startswith(own) and same_size(size, tokens):
            names, left = names + "T", left.removeprefix(own)
        elif left.startswith(own + "K") and same_size(size, tokens * slots):
            names, left = names + "P", left.removeprefix(own + "K")
        elif left and same_size(size, sizes[left[0]]):
            names, left = names + left[0], left[1:]
        else:
            return None
    return None if left else names
