"""Rules of coordinates: where the pairs that chose one expert lie, and rows taken and put there.

where(mask), mask.nonzero()          the pairs' tokens and slots; of (B, S, K) batch, position, slot
flat mask.nonzero()                  the pairs themselves
x[tokens], x[batch, position]        token(x) of one expert's rows
x[mask]                              the same
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from dsmoe_compiler.ir.graph import Size, dtype, same_size, shape
from dsmoe_compiler.passes.lift.axes import count_tokens, token_axes, token_sizes
from dsmoe_compiler.passes.lift.masks import listed, listing
from dsmoe_compiler.passes.lift.state import Lift, Rule, argument, operator_name
from dsmoe_compiler.passes.lift.values import (
    Along,
    Coordinates,
    Mask,
    OneExpert,
    Parts,
    Permutation,
    SlotOf,
    Spread,
    TokenOf,
    Value,
)


@dataclass(frozen=True)
class Located:
    """The rows of `domain` that indices name: by their tokens or (`pairs`) by token and slot, along first
    dimensions of these `sizes`.
    """

    domain: OneExpert
    pairs: bool
    sizes: tuple[Size, ...]

    @property
    def rank(self) -> int:
        """How many dimensions are indexed."""
        return len(self.sizes)


def located(lift: Lift, indices: Sequence[Node], target: Node) -> Located | None:
    """What indices into `target` name, where they name one expert's rows."""
    found = [lift.of(i) for i in indices]
    match found:
        case [Mask() as mask]:
            if dtype(indices[0]) != torch.bool:
                return None  # 0 and 1 are rows
            pairs = listing(mask) != "T"
            if pairs and (listing(mask) == "KT" or "1" in mask.axes):
                return None
            domain = listed(mask)
            return Located(domain, pairs, shape(indices[0])) if domain else None
        case [Permutation(domain=OneExpert() as domain)]:
            return Located(domain, pairs=True, sizes=(count_tokens(domain.ids) * domain.slots,))
        case [TokenOf(domain=OneExpert() as domain), *rest]:
            sizes: tuple[Size, ...] = (count_tokens(domain.ids),)
        case [Along(domain=domain), *_]:
            sizes = token_sizes(domain.ids)
            if found[: len(sizes)] != [Along(domain, axis) for axis in range(len(sizes))]:
                return None
            if not all(map(same_size, sizes, shape(target))):
                return None
            rest = found[len(sizes) :]
        case _:
            return None
    if not rest:
        return Located(domain, pairs=False, sizes=sizes)
    return Located(domain, pairs=True, sizes=(*sizes, domain.slots)) if rest == [SlotOf(domain)] else None


def coordinates(lift: Lift, node: Node) -> Value | None:
    """where(mask), nonzero(mask, as_tuple=True)."""
    found = lift.of(node.args[0])
    if len(node.args) != 1 or not isinstance(found, Mask) or (domain := listed(found)) is None:
        return None
    axes: dict[str, Value] = {"T": TokenOf(domain), "K": SlotOf(domain), "P": Permutation(domain)}
    if len(own := token_axes(found.ids)) > 1:
        axes |= {letter: Along(domain, axis) for axis, letter in enumerate(own)}
    if found.slots == 1:
        axes["1"] = SlotOf(domain)
    return Parts(tuple(axes.get(a) for a in found.axes))


def coordinates_as_rows(lift: Lift, node: Node) -> Value | None:
    """nonzero(mask): a row (token, slot) a pair; of a vector, (n, 1), what flattens it keeps its meaning."""
    found = coordinates(lift, node)
    if not isinstance(found, Parts):
        return None
    return found.items[0] if len(found.items) == 1 else Coordinates(found.items)


def turn(lift: Lift, node: Node) -> Value | None:
    """The transpose of such a matrix."""
    found = lift.of(node.args[0])
    if not isinstance(found, Coordinates):
        return None
    if operator_name(node) == "aten::transpose" and {d % 2 for d in node.args[1:3] if isinstance(d, int)} != {
        0,
        1,
    }:
        return None
    return Coordinates(found.items, not found.across)


def one_coordinate(lift: Lift, node: Node) -> Value | None:
    """nonzero(mask)[:, 0]: the tokens of the pairs."""
    found = lift.of(node.args[0])
    if not isinstance(found, Coordinates) or argument(node, "dim") % 2 != (not found.across):
        return None
    index: int = argument(node, "index")
    return found.items[index]


def unbind(lift: Lift, node: Node) -> Value | None:
    """All coordinates."""
    found, dim = lift.of(node.args[0]), argument(node, "dim")
    if not isinstance(found, Coordinates):
        return None
    return Parts(found.items) if dim % 2 == (not found.across) else None


def spread(lift: Lift, node: Node) -> Value | None:
    """tokens.unsqueeze(-1).expand(-1, D): the rows' tokens, as scatter and gather take them."""
    found, sizes = lift.of(node.args[0]), shape(node)
    if isinstance(found, (TokenOf, Permutation)) and len(sizes) == 2 and same_size(sizes[1], 1):
        return Spread(found, 1)
    if not isinstance(found, Spread) or len(sizes) != 2 or not isinstance(sizes[1], int):
        return None
    if operator_name(node) == "aten::repeat" and argument(node, "repeats")[0] != 1:
        return None
    return Spread(found.at, sizes[1]) if found.width == 1 else None


def flattened(lift: Lift, node: Node) -> Value | None:
    """(n, 1) coordinates as a vector: viewed as one, or their only column; a row would be one pair's."""
    found = lift.of(node.args[0])
    if operator_name(node) == "aten::select" and argument(node, "dim") not in (-1, 1):
        return None
    single = isinstance(found, (TokenOf, Permutation)) and isinstance(found.domain, OneExpert)
    return found if single and len(shape(node)) == 1 else None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten::where": (coordinates,),
    "aten::nonzero_numpy": (coordinates,),
    "aten::nonzero": (coordinates_as_rows,),
    "aten::argwhere": (coordinates_as_rows,),
    "aten::transpose": (turn,),
    "aten::t": (turn,),
    "aten::mT": (turn,),
    "aten::unbind": (unbind,),
    "aten::select": (one_coordinate, flattened),
    "aten::expand": (spread,),
    "aten::expand_as": (spread,),
    "aten::repeat": (spread,),
    "aten::unsqueeze": (spread,),
    "aten::view": (flattened, spread),
    "aten::reshape": (flattened, spread),
    "aten::squeeze": (flattened,),
    "aten::flatten": (flattened,),
}
