"""From a layer's values to what is worth drawing: views join what they are views of, experts that are alike
become one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dsmoe_compiler.ir.name_lists import fold_names
from dsmoe_compiler.report.drawing.alike import alike
from dsmoe_compiler.report.drawing.fused_card import sections_of
from dsmoe_compiler.report.drawing.layer_graph import LayerGraph, Operator, Parameter
from dsmoe_compiler.report.drawing.sketch import LOST, Card, Sketch

# Operators that only rearrange or relabel what one value holds.
_VIEWS = frozenset(
    {
        *("alias", "clone", "contiguous", "detach", "getitem", "to", "type_as", "_to_copy"),
        *("expand", "expand_as", "flatten", "reshape", "squeeze", "unsqueeze", "view", "_unsafe_view"),
        *("mT", "movedim", "permute", "t", "transpose"),
    }
)
_TIP_LINES = 12


@dataclass
class Piece:
    """An operator with the views of its value, and with what only it reads and nothing feeds: constants and
    rearranged parameters.
    """

    main: Operator
    members: list[Operator] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)


def sketch(graph: LayerGraph) -> Sketch:
    """The cards and arrows of a layer's graph; every operator of it is a member of exactly one card.

    An input besides the tokens that one card alone reads is written there, as a parameter is.
    """
    owners = _owners(graph)
    pieces = _pieces(graph, owners)
    groups = alike(pieces, [g.name for g in graph.inputs])
    card_of = {key: group[0] for group in groups for key in group}
    edges = dict.fromkeys(
        (card_of.get(read, read), card_of[key]) for key, piece in pieces.items() for read in piece.reads
    )
    given, inside = list[Card](), dict[str, list[str]]()
    for i, g in enumerate(graph.inputs):
        readers = [b for a, b in edges if a == g.name]
        members = tuple(o.name for o in graph.operators if owners[o.name] == g.name)
        if i and len(readers) == 1 and not members and g.name not in graph.results:
            inside.setdefault(readers[0], []).append(f"{g.name} {_sizes(g.type)}")
        else:
            given.append(Card(g.name, "given", None, g.name, (g.type,), members))
    cards = [*given, *(_card([pieces[key] for key in group], inside.get(group[0], [])) for group in groups)]
    types = {o.name: o.type for o in graph.operators} | {g.name: g.type for g in graph.inputs}
    for result in graph.results:
        cards.append(Card(f"return {result}", "result", None, "return", (types[result],)))
        owner = owners.get(result, result)
        edges[card_of.get(owner, owner), f"return {result}"] = None
    drawn = {card.key for card in cards}
    return Sketch(tuple(cards), tuple((a, b) for a, b in edges if a != b and a in drawn))


def _owners(graph: LayerGraph) -> dict[str, str]:
    """For each operator the one whose card it is on; an input's name where it is a view of that."""
    owners = {g.name: g.name for g in graph.inputs}
    fed = set(owners)  # values that depend on the layer's inputs
    for operator in graph.operators:
        below = list(dict.fromkeys(r for r in operator.reads if r in fed))
        if below:
            fed.add(operator.name)
        view = operator.operator in _VIEWS and len(below) == 1 and not operator.parameters
        owners[operator.name] = owners[below[0]] if view and not operator.lost else operator.name
    results = set(graph.results)
    for operator in reversed(graph.operators):
        if operator.name not in fed and operator.name not in results and not operator.lost:
            readers = [o.name for o in graph.operators if operator.name in o.reads]
            if readers:
                owners[operator.name] = owners[readers[0]]
    return owners


def _pieces(graph: LayerGraph, owners: Mapping[str, str]) -> dict[str, Piece]:
    by_name = {o.name: o for o in graph.operators}
    given = {g.name for g in graph.inputs}
    pieces = {n: Piece(by_name[n]) for n, owner in owners.items() if n == owner and n in by_name}
    for operator in graph.operators:
        piece = pieces.get(owners[operator.name])
        if piece is None:
            continue
        piece.members.append(operator)
        piece.parameters += [p for p in operator.parameters if p not in piece.parameters]
        for read in operator.reads:
            owner = owners[read]
            if owner != piece.main.name and (owner in given or _feeds(read, by_name, given)):
                piece.reads.append(owner)
            elif read in by_name and owner != piece.main.name:
                piece.parameters += [p for p in _held(read, by_name) if p not in piece.parameters]
    return pieces


def _feeds(name: str, by_name: Mapping[str, Operator], given: Iterable[str]) -> bool:
    """Whether a value depends on the layer's inputs."""
    seen, stack = set[str](), [name]
    while stack:
        at = stack.pop()
        if at in given:
            return True
        if at not in seen and at in by_name:
            seen.add(at)
            stack += by_name[at].reads
    return False


def _held(name: str, by_name: Mapping[str, Operator]) -> list[Parameter]:
    """The parameters that a value which depends on no input is made of."""
    operator = by_name[name]
    return [*operator.parameters, *(p for r in operator.reads if r in by_name for p in _held(r, by_name))]


def _card(group: Sequence[Piece], inputs: Sequence[str]) -> Card:
    first = group[0].main
    members = [m for piece in group for m in piece.members]
    tip = [m.line for m in group[0].members]
    tip = tip[:_TIP_LINES] + ["…"] * (len(tip) > _TIP_LINES)
    lost = [LOST] if any(m.lost for m in members) else []
    title = first.operator.rpartition(".")[2] if first.spec is None else first.operator
    return Card(
        first.name,
        "fused" if first.spec else "operator",
        first.role,
        title.removesuffix("_fallback"),
        () if first.spec else (_type_line(first.type), *_parameter_lines(group), *inputs, *lost),
        tuple(m.name for m in members),
        len(group),
        bool(lost),
        sections_of(first.spec, dict(first.lists)) if first.spec else (),
        "\n".join(tip),
    )


def _type_line(text: str) -> str:
    """A type as a card says it: of several values that are alike, the number and the type of one."""
    parts = text[1:-1].split("], ") if text.startswith("(") else []
    whole = [p if p.endswith("]") else f"{p}]" for p in parts]
    if not whole:
        return text
    alike_but_for_sizes = {re.sub(r"\bu\d+\b", "u", p) for p in whole}
    return f"{len(whole)} × {whole[0]}" if len(alike_but_for_sizes) == 1 else ", ".join(whole)


def _parameter_lines(group: Sequence[Piece]) -> list[str]:
    """A line a parameter; those of pieces that are alike folded into one."""
    lines = list[str]()
    for same in zip(*(piece.parameters for piece in group), strict=False):
        names = list(dict.fromkeys(p.name for p in same))
        lines.append(f"{', '.join(fold_names(names))} {_sizes(same[0].type)}")
    return lines


def _sizes(type_text: str) -> str:
    return re.sub(r"^\w+", "", type_text)
