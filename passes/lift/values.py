"""What a value of the graph can mean, as facts.

A `Rows` value says of each of its rows: this is `term` for the row's token, slot and expert. The row *domain*
says which rows there are:

    Pairs(ids, K, order=None)   the T·K (token, slot) pairs in their own order
    Pairs(ids, K, order=%sort)  the same pairs, sorted by expert
    Everywhere(E, axis)         every token for every expert, experts on dimension `axis` of (E, T)
    Capacity(E, axis, parts)    the capacity slots of every expert, experts on dimension `axis` of (E, C)
    OneExpert(ids, K, e, order) the pairs that chose expert e, in one of the orders in which code lists them

Letters: T tokens, K ids per token, E experts, C capacity slots per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
from torch.fx import Node


@dataclass(frozen=True)
class Pairs:
    """The (token, slot) pairs of `ids`; `ids` is None while only K is known (tokens repeated K times)."""

    ids: Node | None
    slots: int
    order: Node | None = None

    @property
    def words(self) -> str:
        """For a reader."""
        return "pairs in their own order" if self.order is None else "pairs sorted by expert"

    def meet(self, other: Domain) -> Pairs | None:
        """The same rows said with all that either knows, or None when they are not the same rows."""
        if not isinstance(other, Pairs) or (self.slots, self.order) != (other.slots, other.order):
            return None
        if self.ids is not None and other.ids is not None and self.ids is not other.ids:
            return None
        return self if self.ids is not None else other


@dataclass(frozen=True)
class Everywhere:
    """Every token for each of `experts` experts; `axis` is the experts' dimension while the rows have two."""

    experts: int
    axis: int = 0

    @property
    def words(self) -> str:
        """For a reader."""
        return "every token for every expert"

    def meet(self, other: Domain) -> Everywhere | None:
        """The same rows, or None."""
        return self if self == other else None


@dataclass(frozen=True)
class Capacity:
    """The capacity slots of each of `experts` experts; `axis` is the experts' dimension, of two.

    `parts` say which pair sits in which slot, each of them of other pairs; a slot nobody sits in holds no
    pair's row. Where every of `groups` groups of tokens has slots of its own, rows may have three dimensions:
    experts and groups, in the order that `axis` says, and slots.
    """

    experts: int
    axis: int
    ids: Node
    slots: int
    parts: tuple[OneHot, ...]
    groups: sympy.Expr | None = None

    @property
    def words(self) -> str:
        """For a reader."""
        return "the capacity slots of every expert"

    def meet(self, other: Domain) -> Capacity | None:
        """The same rows, or None."""
        return self if self == other else None


@dataclass(frozen=True)
class OneExpert:
    """The pairs of `ids` that chose one expert.

    `order` says how they are listed: "token" by token (then slot), "slot" by slot (then token), as the
    sort that is a node lists them, or as capacity slots hold them; `slot` that only pairs of this slot are.
    """

    ids: Node
    slots: int
    expert: int
    order: Node | str | Capacity
    slot: int | None = None

    @property
    def words(self) -> str:
        """For a reader."""
        return f"the rows of expert {self.expert}" + ("" if self.slot is None else f" in slot {self.slot}")

    def meet(self, other: Domain) -> OneExpert | None:
        """The same rows, or None."""
        return self if self == other else None


Domain: TypeAlias = Pairs | Everywhere | Capacity | OneExpert
GRIDS = (Everywhere, Capacity)  # rows numbered by two dimensions, one of them the experts


@dataclass(frozen=True)
class Rows:
    """Row r of the value is `term`, whose width is the product of `trail`; `lead` dimensions number the rows.

    At most one dimension of `trail` is not 1, but for an expert's weight matrix gathered per row, which has
    two (`flipped` says that they are the parameter's transposed)."""

    domain: Domain
    term: int
    lead: int
    trail: tuple[int, ...]
    flipped: bool = False

    @property
    def width(self) -> int:
        product = 1
        for size in self.trail:
            product *= size
        return product

    @property
    def is_matrix(self) -> bool:
        return sum(size != 1 for size in self.trail) > 1

    def like(self, term: int, trail: tuple[int, ...] | None = None, domain: Domain | None = None) -> Rows:
        """The same rows holding another term."""
        return replace(
            self, term=term, trail=self.trail if trail is None else trail, domain=domain or self.domain
        )


@dataclass(frozen=True)
class ExpertsLast:
    """Rows of every token for every expert, their experts' dimension moved behind the width: (T, D, E)."""

    rows: Rows


@dataclass(frozen=True)
class Folded:
    """Rows whose width is seen as `outer` parts of `inner` numbers each."""

    rows: Rows
    outer: int
    inner: int


@dataclass(frozen=True)
class Parts:
    """Several values of one node, picked by getitem."""

    items: tuple[Value | None, ...]


@dataclass(frozen=True)
class SortedIds:
    """The expert of each row, ascending."""

    domain: Pairs


@dataclass(frozen=True)
class Permutation:
    """Of each row of `domain` (sorted, or one expert's), the pair it is."""

    domain: Pairs | OneExpert


@dataclass(frozen=True)
class InversePermutation:
    """Of each pair, the row of `domain` (sorted) that holds it."""

    domain: Pairs


@dataclass(frozen=True)
class TokenOf:
    """The token of each row."""

    domain: Pairs | OneExpert


@dataclass(frozen=True)
class SlotOf:
    """The slot of each row."""

    domain: OneExpert


@dataclass(frozen=True)
class Along:
    """Where each row's token lies along one of the ids' own token dimensions, such as the batch."""

    domain: OneExpert
    axis: int


@dataclass(frozen=True)
class Counts:
    """How many pairs of `ids` each of `experts` experts has."""

    ids: Node
    experts: int


@dataclass(frozen=True)
class Offsets:
    """Where each expert's rows end among the sorted rows of `ids`."""

    ids: Node
    experts: int


@dataclass(frozen=True)
class OneHot:
    """1 (or the pair's weight, a (T, K) value) where a pair chose an expert.

    `axes` names the dimensions: T tokens, K slots, P pairs, E experts; Q pairs slot by slot, C capacity
    slots, "1" one of size 1. Where `place` is known, 1 only at the pair's place among C. It may be 0 where
    the number in `hidden` is 0, too.
    """

    ids: Node
    experts: int
    weight: Node | None = None
    axes: str = "TKE"
    place: Place | None = None
    hidden: Node | None = None


@dataclass(frozen=True)
class Queue:
    """How many pairs chose an expert up to each pair, in any order of pairs: its place in the expert's queue.

    The first place is `start`; pairs of the ids in `before` stand in each queue before those of `ids`. `axes`
    are a one-hot's, the other experts' numbers being of no use. `counted` is where they were counted: the
    same ids counted in another order are another queue. Along the dimensions in `groups`, each group of
    tokens has queues of its own.
    """

    ids: Node
    counted: Node
    experts: int
    axes: str
    start: int
    before: tuple[Node, ...] = ()
    groups: str = ""


@dataclass(frozen=True)
class OwnPlaces:
    """A queue's places where a pair of `of` chose the expert, 0 elsewhere."""

    queue: Queue
    of: Node


@dataclass(frozen=True)
class Place:
    """Of each pair that `of` keeps, its place in its expert's queue, but at most `most` where that is known.

    No two pairs have the same place with the same expert, up to `most`.
    """

    queue: Queue
    of: Node
    axes: str
    most: sympy.Expr | None = None


@dataclass(frozen=True)
class PlaceHot:
    """1 at each pair's place among `classes`, C of them; nowhere if it is none of them."""

    place: Place
    axes: str
    classes: sympy.Expr
    node: Node


@dataclass(frozen=True)
class Limit:
    """A pair's place in the queue counted by a node, as starting at 0, is at most `most`."""

    counted: Node
    before: tuple[Node, ...]
    most: sympy.Expr


@dataclass(frozen=True)
class Kept:
    """Of ids made of `parent` by dropping pairs: those past `limit`, or, where it is None, whichever."""

    parent: Node
    limit: Limit | None


@dataclass(frozen=True)
class Within:
    """True (or 1) where the place of a pair of `of` is within a limit; `axes` a one-hot's or the pairs'."""

    limit: Limit
    of: Node
    axes: str


@dataclass(frozen=True)
class Flags:
    """1 for the pairs that `ids` keep, 0 for those it drops."""

    ids: Node
    axes: str


@dataclass(frozen=True)
class KeptWeights:
    """The pairs' `weight` where `ids` keep the pair, 0 where they drop it."""

    ids: Node
    weight: Node
    axes: str


@dataclass(frozen=True)
class Totals:
    """(1, E): how many pairs of `ids` chose each expert, in each of `groups`."""

    ids: Node
    groups: str = ""


@dataclass(frozen=True)
class Dispatch:
    """(T, E, C): the sum of several one-hots with places, each of another slot's pairs."""

    parts: tuple[OneHot, ...]


@dataclass(frozen=True)
class MultiHot:
    """(T, E): 1 where any slot of the token chose the expert; integers."""

    ids: Node
    experts: int


@dataclass(frozen=True)
class Mask:
    """True (or 1) where a pair chose one expert; `axes` names the dimensions, as in axes.py.

    Without "K" it says that any slot did, or the one that is given.
    """

    ids: Node
    slots: int
    expert: int
    axes: str
    slot: int | None = None


@dataclass(frozen=True)
class Outside:
    """True where `mask` is not."""

    mask: Mask


@dataclass(frozen=True)
class Coordinates:
    """A matrix of which row (column, where `across`) i holds the i-th chosen pair's token, slot, …"""

    items: tuple[Value | None, ...]
    across: bool = False


@dataclass(frozen=True)
class Spread:
    """An index for each row, the same for each of the row's `width` numbers."""

    at: TokenOf | Permutation
    width: int


@dataclass(frozen=True)
class Count:
    """One number: how many pairs of `ids` chose an expert from `first` on, before `stop`."""

    ids: Node
    first: int
    stop: int


@dataclass(frozen=True)
class Column:
    """A number a token, which is `term` of the pair where the token chose the expert.

    `zero` says that it is 0 where the token did not.
    """

    domain: OneExpert
    term: int
    trail: tuple[int, ...] = ()
    zero: bool = False


@dataclass(frozen=True)
class MaskedWeights:
    """(T, K): the pairs' weights where they chose one expert, 0 elsewhere."""

    domain: OneExpert
    term: int


@dataclass(frozen=True)
class Visit:
    """What a loop computed for one expert's pairs, or for those of one slot."""

    expert: int
    term: int
    slot: int | None = None

    @property
    def words(self) -> str:
        """For a reader."""
        return f"expert {self.expert}" + ("" if self.slot is None else f" in slot {self.slot}")


@dataclass(frozen=True)
class PartialSum:
    """(T, D): `base` (nothing if None) plus each token's rows of the experts visited so far, in order."""

    ids: Node
    slots: int
    visits: tuple[Visit, ...]
    width: int
    base: Node | None = None


@dataclass(frozen=True)
class DenseVisit:
    """What an expert gives for every token, and the term that weighs it."""

    expert: int
    weight: int
    rows: Node


@dataclass(frozen=True)
class DenseSum:
    """(T, D): `base` (nothing if None) plus what experts give for every token, weighed by 0 off its ids."""

    ids: Node
    slots: int
    visits: tuple[DenseVisit, ...]
    width: int
    base: Node | None = None


@dataclass(frozen=True)
class SlotSum:
    """(T, D): the sum of some slots' rows, each slot with its term over all pairs."""

    ids: Node
    slots: int
    terms: tuple[tuple[int, int], ...]
    width: int


@dataclass(frozen=True)
class PartialRows:
    """The pairs in their own order, the rows of the experts visited so far written."""

    ids: Node
    slots: int
    visits: tuple[Visit, ...]
    trail: tuple[int, ...]


@dataclass(frozen=True)
class Filled:
    """A fresh tensor holding one number."""

    number: float


@dataclass(frozen=True)
class Scratch:
    """A fresh tensor whose content is undefined."""


@dataclass(frozen=True)
class Range:
    """0, 1, 2, …"""


@dataclass(frozen=True)
class Group:
    """The experts from `first` on, before `stop`, which all compute `term`."""

    first: int
    stop: int
    term: int


@dataclass(frozen=True)
class Combined:
    """Rows have become tokens: out[t] = base[t] + Σ over the token's rows of `term`.

    Only ids from 0 on and before `visited` contribute, where it is known; else all, as an index takes them.
    It holds where none of the values in `nonnegative` has a number below 0. Pairs of the experts `beside`,
    which have no tensors of their own, add what these compute.
    """

    rows: Rows
    base: Node | None = None
    visited: int | None = None
    nonnegative: tuple[Node, ...] = ()
    beside: tuple[Group, ...] = ()


Value: TypeAlias = (
    Rows
    | ExpertsLast
    | Folded
    | Parts
    | SortedIds
    | Permutation
    | InversePermutation
    | TokenOf
    | SlotOf
    | Along
    | Counts
    | Offsets
    | OneHot
    | Queue
    | OwnPlaces
    | Place
    | PlaceHot
    | Within
    | Flags
    | KeptWeights
    | Totals
    | Dispatch
    | MultiHot
    | Mask
    | Outside
    | Coordinates
    | Spread
    | Count
    | Column
    | MaskedWeights
    | PartialSum
    | DenseSum
    | SlotSum
    | PartialRows
    | Filled
    | Scratch
    | Range
    | Combined
)
