"""Where meaning ended: a value that was understood met an operator that no rule carries it through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass

from torch.fx import Node

from dsmoe_compiler.passes.lift.values import (
    Combined,
    DenseSum,
    ExpertsLast,
    Filled,
    PartialRows,
    PartialSum,
    Range,
    Rows,
    Scratch,
    SlotSum,
    Value,
)

# Values that belong to no layer's routing, or that anything may read: their meaning is not lost in what does.
_NOT_OF_A_LAYER = (Combined, Filled, Scratch, Range)


@dataclass(frozen=True)
class Lost:
    """Where a layer's meaning ended: its ids (None if not known), the node, a refusal code, a reason (none
    where no rule knows the operator).

    `last` is the argument that says most of what was understood until there, and what it means. A `silent`
    loss need not be one: statistics read routing values too, and rules look at more than one operator.
    """

    ids: Node | None
    node: Node
    code: str
    because: str
    last: tuple[Node, Value] | None = None
    silent: bool = False


def most_telling(known: Iterable[tuple[Node, Value]]) -> tuple[Node, Value] | None:
    """Of values with their meanings, one of the layer that says most; None where none is of a layer."""
    own = [(node, found) for node, found in known if not isinstance(found, _NOT_OF_A_LAYER)]
    return max(own, key=lambda each: _told_by(each[1]), default=None)


def _told_by(found: Value) -> int:
    if isinstance(found, (PartialSum, DenseSum, PartialRows, SlotSum)):
        return 3
    if isinstance(found, Rows):
        return 1 if found.is_matrix else 2
    if isinstance(found, ExpertsLast):
        return 2
    return 0


def ids_in(found: object) -> Node | None:
    """The ids that a meaning is about, wherever in it they are; None where it knows none."""
    if isinstance(found, tuple):
        return next((ids for item in found if (ids := ids_in(item)) is not None), None)
    if not is_dataclass(found) or isinstance(found, type):
        return None
    if isinstance(ids := getattr(found, "ids", None), Node):
        return ids
    return ids_in(tuple(getattr(found, field.name) for field in fields(found)))
