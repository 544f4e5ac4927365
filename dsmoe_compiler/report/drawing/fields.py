"""The fields behind the operators of one role: their names are written in a corner that no arrow crosses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dsmoe_compiler.report.drawing.layer_graph import Role
from dsmoe_compiler.report.drawing.layout import Box, Layout, Point
from dsmoe_compiler.report.drawing.scene import Label

_SIZE, _ASIDE, _CLEAR = 12.0, 12.0, 3.0


def field_label(role: Role, layout: Layout) -> Label:
    """The role's name in its field."""
    field = layout.groups[role]
    labels = [_at(role, x, y) for x, y in _corners(role, field)]
    boxes = list(layout.boxes.values())
    lines = [pair for arrow in layout.arrows for pair in zip(arrow, arrow[1:], strict=False)]
    return next((label for label in labels if _is_free(label.box, boxes, lines)), labels[0])


def _at(role: Role, x: float, y: float) -> Label:
    return Label(role, x, y, _SIZE, f"heading role-name {role}", fixed=False)


def _corners(role: Role, field: Box) -> Iterator[Point]:
    """Baselines in the four corners, then further along the upper and lower edges."""
    width = _at(role, 0, 0).box.width
    left, right = field.x + _ASIDE, field.right - _ASIDE - width
    for share in (0.0, 1.0, 0.25, 0.75, 0.5):
        x = left + (right - left) * share
        yield x, field.y + 20
        yield x, field.bottom - 11


def _is_free(box: Box, boxes: Iterable[Box], lines: Iterable[tuple[Point, Point]]) -> bool:
    wide = Box(box.x - _CLEAR, box.y - _CLEAR, box.width + 2 * _CLEAR, box.height + 2 * _CLEAR)
    spans = [Box(min(a[0], b[0]), min(a[1], b[1]), abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in lines]
    return not any(wide.meets(other) for other in (*boxes, *spans))
