"""Which operators of a layer are copies of each other: the same operator on the same kind of values, read in
the same way, as the experts of an unrolled loop are.

Two passes of hashing in the manner of Weisfeiler and Leman, from the inputs down and from the results up. A
sum that each expert adds to in turn (a chain) counts as if every expert added to its beginning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx

if TYPE_CHECKING:
    from dsmoe_compiler.report.drawing.fold import Piece

LEAST = 3  # fewer copies are drawn one by one
_SUMS = ("add", "index_add", "index_put", "scatter_add", "index_copy", "maximum", "where")
_UNORDERED = ("add", "cat", "concat", "stack", "maximum")


def alike(pieces: Mapping[str, Piece], given: Iterable[str]) -> list[tuple[str, ...]]:
    """The pieces' names in groups of copies, in order of appearance."""
    flow: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    flow.add_nodes_from(pieces)
    for name, piece in pieces.items():
        for place, read in enumerate(piece.reads):
            flow.add_edge(read, name, place=0 if _name(piece) in _UNORDERED else place)
    chained = {(a, b) for a, b in dict.fromkeys(flow.edges()) if _chains(flow, pieces, a, b)}
    from_above = _from_above(flow, pieces, chained, set(given))
    from_below = _from_below(flow, pieces, chained)
    groups = dict[tuple[str, str], list[str]]()
    for name in pieces:
        groups.setdefault((from_above[name], from_below[name]), []).append(name)
    split = [[g] if len(g) >= LEAST else [[n] for n in g] for g in groups.values()]
    order = {name: i for i, name in enumerate(pieces)}
    return sorted((tuple(group) for several in split for group in several), key=lambda g: order[g[0]])


def _chains(flow: nx.MultiDiGraph[str], pieces: Mapping[str, Piece], a: str, b: str) -> bool:
    """Whether `b` adds to the sum that `a` is, and nobody else reads it."""
    if a not in pieces or _name(pieces[a]) not in _SUMS:
        return False
    return _kind(pieces[a]) == _kind(pieces[b]) and set(flow.successors(a)) == {b}


def _from_above(
    flow: nx.MultiDiGraph[str],
    pieces: Mapping[str, Piece],
    chained: set[tuple[str, str]],
    given: set[str],
) -> dict[str, str]:
    """A name for how each piece is computed."""
    named = {name: _hash(name) for name in given}
    beginning = dict[tuple[str, int], str]()  # what a chain began with, by its latest sum and the place
    for name in nx.topological_sort(flow):
        if name in given:
            continue
        read = list[tuple[int, str]]()
        for below, _, place in flow.in_edges(name, data="place"):
            if (below, name) in chained:
                read.append((place, beginning.get((below, place), named[below])))
            else:
                read.append((place, named[below]))
        for place, what in sorted(read):
            beginning.setdefault((name, place), what)
        named[name] = _hash(_kind(pieces[name]), sorted(read))
    return named


def _from_below(
    flow: nx.MultiDiGraph[str], pieces: Mapping[str, Piece], chained: set[tuple[str, str]]
) -> dict[str, str]:
    """A name for how each piece is read."""
    named = dict[str, str]()
    for name in reversed(list(nx.topological_sort(flow))):
        if name not in pieces:
            continue
        after = [b for b in flow.successors(name) if (name, b) in chained]
        if after:
            named[name] = named[after[0]]
            continue
        readers = sorted(
            (place, _kind(pieces[reader]), named[reader])
            for _, reader, place in flow.out_edges(name, data="place")
        )
        named[name] = _hash(readers)
    return named


def _name(piece: Piece) -> str:
    return piece.main.operator.removesuffix("_")


def _kind(piece: Piece) -> str:
    """What the operator is and gives, whatever expert it is of."""
    tensors = [p.type for p in piece.parameters]
    return repr((_name(piece), _plain(piece.main.type), piece.main.role, tensors))


def _plain(type_text: str) -> str:
    return re.sub(r"\bu\d+\b", "u", type_text)


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
