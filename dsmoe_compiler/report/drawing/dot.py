"""A layer as Graphviz text, for those who have `dot` and want it their way."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe_compiler.report.drawing.fold import sketch
from dsmoe_compiler.report.drawing.layer_graph import ROLES, LayerAnatomy
from dsmoe_compiler.report.drawing.measure import badge
from dsmoe_compiler.report.drawing.sketch import Card, Sketch

_COLOURS = {
    "router": "#4f63c6",
    "permutation": "#737c88",
    "experts": "#14806a",
    "combine": "#a86a12",
    "shared": "#9a4788",
}
_LOST, _PLAIN = "#c22f28", "#8a94a0"


def dot(anatomy: LayerAnatomy) -> str:
    """A digraph with a cluster for each side, and in it one for each role."""
    name = anatomy.report.name or anatomy.model
    lines = [
        f"digraph {_quoted(name)} {{",
        "  compound=true; rankdir=TB; nodesep=0.3; ranksep=0.35;",
        '  node [shape=box, style="rounded,filled", fillcolor="white", fontname="monospace", fontsize=10];',
        f'  edge [color="{_PLAIN}", arrowsize=0.7];',
        '  graph [fontname="sans-serif", fontsize=12, labeljust=l, style="rounded"];',
        *_side("before", "Before", sketch(anatomy.before)),
    ]
    if anatomy.after is not None:
        lines += _side("after", "After", sketch(anatomy.after))
    return "\n".join([*lines, "}\n"])


def _side(key: str, title: str, drawn: Sketch) -> Iterator[str]:
    yield f"  subgraph cluster_{key} {{"
    yield f'    label={_quoted(title)}; color="{_PLAIN}";'
    for role in ROLES:
        own = [c for c in drawn.cards if c.kind == "operator" and c.role == role]
        if own:
            yield f"    subgraph cluster_{key}_{role} {{"
            yield f'      label={_quoted(role)}; color="{_COLOURS[role]}"; fontcolor="{_COLOURS[role]}";'
            yield from (f"      {_node(key, card)}" for card in own)
            yield "    }"
    yield from (f"    {_node(key, card)}" for card in drawn.cards if card.kind != "operator")
    yield from (f"    {_id(key, a)} -> {_id(key, b)};" for a, b in drawn.arrows)
    yield "  }"


def _node(side: str, card: Card) -> str:
    lines = [f"{card.title} {badge(card)}".strip(), *card.lines]
    for section in card.sections:
        lines += ["", section.heading, *(f"  {line}" for line in (*section.lines, *section.code))]
    label = "".join(f"{_escaped(line)}\\l" for line in lines)
    role = card.role if card.kind == "operator" else None
    colour = _LOST if card.lost else _COLOURS.get(role or "", _PLAIN)
    line = ", penwidth=2" if card.lost or card.copies > 1 else ""
    return f'{_id(side, card.key)} [label="{label}", color="{colour}"{line}];'


def _id(side: str, key: str) -> str:
    return _quoted(f"{side} {key}")


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
