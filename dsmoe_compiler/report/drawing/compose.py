"""The whole picture of a layer: what it was on the left, what it became on the right."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import replace

from dsmoe_compiler.report.drawing.cards import card_group
from dsmoe_compiler.report.drawing.fields import field_label
from dsmoe_compiler.report.drawing.fold import sketch
from dsmoe_compiler.report.drawing.layer_graph import LayerAnatomy, LayerGraph
from dsmoe_compiler.report.drawing.layout import Box, Layout, place
from dsmoe_compiler.report.drawing.measure import MONO, SMALL, Size, mono, sans
from dsmoe_compiler.report.drawing.scene import Group, Label, Line, Scene, Shape
from dsmoe_compiler.report.drawing.sketch import Sketch
from dsmoe_compiler.report.story import WHOLE_MODEL

_MARGIN, _HEADER, _BETWEEN, _INNER, _PANEL_HEAD = 32.0, 64.0, 84.0, 28.0, 54.0
_LEAST = 640.0  # a narrower picture leaves no room for its heading
_STEP = 17.0


def compose(anatomy: LayerAnatomy, heading: bool = True) -> Scene:
    """The layer's picture, under its name where `heading`; of a layer that was refused, what it is and where
    understanding ended.
    """
    before = sketch(anatomy.before)
    laid = place(before)
    refusal = _refusal_lines(anatomy, max(laid.size.width, _LEAST - 2 * _INNER))
    notes = [*_drawn(anatomy.before, before), *refusal]
    left = _Panel("Before", notes, len(refusal), before, laid)
    panels = [left]
    if anatomy.after is not None:
        after = sketch(anatomy.after)
        panels.append(_Panel("After", _became(anatomy, anatomy.after), 0, after, place(after)))
    scene = Scene(f"{anatomy.report.name or WHOLE_MODEL} of {anatomy.model}", 0, 0)
    x, y = _MARGIN, _HEADER + _MARGIN if heading else _MARGIN
    for i, panel in enumerate(panels):
        if i:
            scene.groups.append(_becomes(x, y + 150))
            x += _BETWEEN
        scene.groups += panel.groups(x, y)
        x += panel.size.width
    scene.width, scene.height = x + _MARGIN, y + max(panel.size.height for panel in panels) + _MARGIN
    if heading:
        scene.groups.insert(0, _header(anatomy))
    scene.width = max(scene.width, *(label.box.right + _MARGIN for label in scene.labels))
    return scene


class _Panel:
    """One side of the picture; the last `alarms` of its notes tell a refusal."""

    def __init__(self, title: str, notes: list[str], alarms: int, content: Sketch, layout: Layout) -> None:
        self.title, self.notes, self.alarms = title, notes, alarms
        self.content, self.layout = content, layout
        self.head = _PANEL_HEAD + _STEP * max(0, len(notes) - 1) + (10 if alarms else 0)
        widest = max(sans(title, 15), *(mono(note, SMALL) for note in notes))
        width = max(layout.size.width, widest) + 2 * _INNER
        self.size = Size(width, self.head + layout.size.height + 2 * _INNER)

    def groups(self, x: float, y: float) -> list[Group]:
        """The panel with its upper left corner at (x, y)."""
        back = Group(shapes=[Shape(Box(x, y, self.size.width, self.size.height), "panel", 12)])
        back.labels.append(Label(self.title, x + _INNER, y + 32, 15, "panel-title", fixed=False))
        first_alarm = len(self.notes) - self.alarms
        top = y + 52
        for i, note in enumerate(self.notes):
            alarming = i >= first_alarm
            if i == first_alarm and self.alarms:
                top += 10
                box = Box(
                    x + _INNER - 10, top - 15, self.size.width - 2 * _INNER + 20, _STEP * self.alarms + 8
                )
                back.shapes.append(Shape(box, "alarm", 6))
            back.labels.append(Label(note, x + _INNER, top, SMALL, "alarm-text" if alarming else "note"))
            top += _STEP
        dx = x + (self.size.width - self.layout.size.width) / 2
        dy = y + self.head + _INNER
        arrows = Group(
            lines=[Line(tuple((a + dx, b + dy) for a, b in points), "arrow") for points in self.layout.arrows]
        )
        fields, names = Group(), Group()
        for role, box in self.layout.groups.items():
            fields.shapes.append(Shape(box.moved(dx, dy), f"field {role}", 10))
            name = field_label(role, self.layout)
            names.labels.append(replace(name, x=name.x + dx, y=name.y + dy))
        cards = [card_group(c, self.layout.boxes[c.key].moved(dx, dy)) for c in self.content.cards]
        return [back, fields, arrows, names, *cards]


def _header(anatomy: LayerAnatomy) -> Group:
    report = anatomy.report
    group = Group()
    group.labels.append(Label(report.name or WHOLE_MODEL, _MARGIN, 48, 20, "name"))
    facts = [anatomy.model, report.idiom if report.fused else "not fused", report.source]
    group.labels.append(Label(" · ".join(f for f in facts if f), _MARGIN, 70, 12, "note", fixed=False))
    return group


def _becomes(x: float, y: float) -> Group:
    """The arrow between the two sides."""
    middle = x + _BETWEEN / 2
    return Group(lines=[Line(((middle - 20, y), (middle + 20, y)), "becomes")])


def _drawn(graph: LayerGraph, drawn: Sketch) -> list[str]:
    """How many operators there are, and how they are drawn."""
    copies = max((card.copies for card in drawn.cards), default=1)
    more = f", {copies} alike as one" if copies > 1 else ""
    unseen = [_count(graph.sizes, "size"), _count(graph.assertions, "assertion")]
    left_out = "; not drawn: " + ", ".join(u for u in unseen if u) if any(unseen) else ""
    operators = _count(len(graph.operators), "operator")
    return [f"{operators} on data, in {drawn.shown} boxes: views joined{more}{left_out}"]


def _became(anatomy: LayerAnatomy, after: LayerGraph) -> list[str]:
    was = len(anatomy.before.operators)
    spec = anatomy.report.spec
    kept = "" if spec is None or spec.router else ", the router as written"
    return [f"{was} → {len(after.operators)} operators on data{kept}"]


def _refusal_lines(anatomy: LayerAnatomy, width: float) -> list[str]:
    refusal = anatomy.report.refusal
    if refusal is None:
        return []
    said = f"{refusal.code} {refusal.because}"
    lost = [o.name for o in anatomy.before.operators if o.lost]
    where = ", ".join(filter(None, (f"at {lost[0]}" if lost else "", refusal.source)))
    return [line for part in (said, where) for line in _wrapped(part, width)]


def _wrapped(text: str, width: float) -> Iterable[str]:
    return textwrap.wrap(text, int(width / (SMALL * MONO)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}" if number else ""
