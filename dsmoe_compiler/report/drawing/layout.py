"""Where cards and arrows lie: layers from top to bottom (Sugiyama), by graphlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.report.drawing.layer_graph import ROLES, Role
from dsmoe_compiler.report.drawing.measure import Size, size_of
from dsmoe_compiler.report.drawing.sketch import Sketch

try:
    import graphlay
except ImportError as e:  # an incomplete installation: everything but drawings works
    raise InputError("drawings need the package graphlay: pip install graphlay") from e

Point = tuple[float, float]
_OPTIONS = {
    "direction": "topbottom",
    "spacing": {
        "layer_gap": 30.0,
        "node_gap": 26.0,
        "dummy_gap": 18.0,
        "port_gap": 16.0,
        "stub": 9.0,
        "compound_padding": 14.0,
        "compound_header": 12.0,
    },
}


@dataclass(frozen=True)
class Box:
    """A rectangle by its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def moved(self, dx: float, dy: float) -> Box:
        """The same rectangle elsewhere."""
        return Box(self.x + dx, self.y + dy, self.width, self.height)

    def meets(self, other: Box) -> bool:
        """Whether the two have a point in common, edges not counted."""
        across = self.x < other.right and other.x < self.right
        return across and self.y < other.bottom and other.y < self.bottom


@dataclass(frozen=True)
class Layout:
    """The box of each card and of each role's group, the corners of each arrow, from (0, 0) to `size`."""

    boxes: Mapping[str, Box]
    groups: Mapping[Role, Box]
    arrows: tuple[tuple[Point, ...], ...]
    size: Size


def place(sketch: Sketch) -> Layout:
    """Lay a sketch out, the operators of one role together; the same sketch is laid out the same."""
    graph = graphlay.Graph()
    present = {card.role for card in sketch.cards if card.kind == "operator"}
    groups = {role: graph.node(f"group {role}") for role in ROLES if role in present}
    for card in sketch.cards:
        size = size_of(card)
        parent = groups[card.role] if card.kind == "operator" and card.role else None
        graph.node(card.key, width=size.width, height=size.height, parent=parent)
    for source, target in sketch.arrows:
        graph.edge(source, target)
    found = graphlay.layout(graph, preset="layered", options=_OPTIONS)
    left, top = found.bounds["min"]["x"], found.bounds["min"]["y"]
    boxes = {str(key): _box(node, left, top) for key, node in zip(found.ids, found.nodes, strict=True)}
    arrows = tuple(
        _straight([(_round(p["x"] - left), _round(p["y"] - top)) for p in edge["points"]])
        for edge in found.edges
    )
    return Layout(
        {card.key: boxes[card.key] for card in sketch.cards},
        {role: boxes[f"group {role}"] for role in groups},
        arrows,
        Size(
            max([x for a in arrows for x, _ in a] + [b.right for b in boxes.values()]),
            max([y for a in arrows for _, y in a] + [b.bottom for b in boxes.values()]),
        ),
    )


def _straight(points: Sequence[Point]) -> tuple[Point, ...]:
    """The corners, those that are off a line along an axis by less than a pixel moved onto it."""
    straight = [points[0]]
    for x, y in points[1:-1]:
        before = straight[-1]
        straight.append(
            (before[0] if abs(x - before[0]) < 1 else x, before[1] if abs(y - before[1]) < 1 else y)
        )
    return (*straight, points[-1])


def _box(node: Mapping[str, Any], left: float, top: float) -> Box:
    width, height = float(node["size"]["width"]), float(node["size"]["height"])
    x, y = node["center"]["x"] - width / 2 - left, node["center"]["y"] - height / 2 - top
    return Box(_round(x), _round(y), width, height)


def _round(number: float) -> float:
    return round(float(number), 1) + 0.0
