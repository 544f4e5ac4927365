"""What a value of the graph can mean, as facts.

A `Rows` value says of each of its rows: this is `term` for the row's token, slot and expert. The row *domain*
says which rows there are:

    Pairs(ids, K, order=None)   the T·K (token, slot) pairs in their own order
    Pairs(ids, K, order=%sort)  the same pairs, sorted by expert
    Everywhere(E, axis)         every token for every expert, experts on dimension `axis` of (E, T)

Letters: T tokens, K ids per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from torch.fx import Node


@dataclass(frozen=True)
class Pairs:
    """The (token, slot) pairs of `ids`; `ids` is None while only K is known (tokens repeated K times)."""

    ids: Node | None
    slots: int
    order: Node | None = None

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

    def meet(self, other: Domain) -> Everywhere | None:
        """The same rows, or None."""
        return self if self == other else None


Domain: TypeAlias = Pairs | Everywhere


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
class Parts:
    """Several values of one node, picked by getitem."""

    items: tuple[Value | None, ...]


@dataclass(frozen=True)
class SortedIds:
    """The expert of each row, ascending."""

    domain: Pairs


@dataclass(frozen=True)
class Permutation:
    """Of each row of `domain` (sorted), the pair it is."""

    domain: Pairs


@dataclass(frozen=True)
class InversePermutation:
    """Of each pair, the row of `domain` (sorted) that holds it."""

    domain: Pairs


@dataclass(frozen=True)
class TokenOf:
    """The token of each row."""

    domain: Pairs


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
    """(T, K, E): 1 (or the pair's weight, a (T, K) value) where slot k of token t chose expert e."""

    ids: Node
    experts: int
    weight: Node | None = None


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
class Combined:
    """Rows have become tokens: out[t] = Σ over the token's rows of `term`."""

    rows: Rows


Value: TypeAlias = (
    Rows
    | Parts
    | SortedIds
    | Permutation
    | InversePermutation
    | TokenOf
    | Counts
    | Offsets
    | OneHot
    | Filled
    | Scratch
    | Range
    | Combined
)
