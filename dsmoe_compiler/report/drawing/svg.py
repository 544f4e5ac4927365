"""A drawing as SVG that stands alone: no font, script or image from elsewhere; dark where the reader is."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from dsmoe_compiler.report.drawing.layout import Point
from dsmoe_compiler.report.drawing.palette import SVG_STYLE
from dsmoe_compiler.report.drawing.scene import Group, Label, Line, Scene, Shape

_CORNER = 7.0
_HEAD = 7.0


def svg(scene: Scene) -> str:
    """The scene as one SVG element."""
    width, height = _number(scene.width), _number(scene.height)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="layer" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(scene.title)}>',
            f"<title>{escape(scene.title)}</title>",
            f"<style>{SVG_STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height}"/>',
            *(_group(group) for group in scene.groups),
            "</svg>\n",
        ]
    )


def _group(group: Group) -> str:
    tip = [f"<title>{escape(group.tip)}</title>"] if group.tip else []
    content = [*map(_shape, group.shapes), *map(_line, group.lines), *map(_label, group.labels)]
    return "\n".join(["<g>", *tip, *content, "</g>"])


def _shape(shape: Shape) -> str:
    box = shape.box
    place = f'x="{_number(box.x)}" y="{_number(box.y)}"'
    size = f'width="{_number(box.width)}" height="{_number(box.height)}"'
    return f'<rect class="{shape.look}" {place} {size} rx="{_number(shape.radius)}"/>'


def _label(label: Label) -> str:
    family = "mono" if label.fixed else "sans"
    return (
        f'<text class="{family} {label.look}" x="{_number(label.x)}" y="{_number(label.y)}" '
        f'font-size="{_number(label.size)}">{escape(label.text)}</text>'
    )


def _line(line: Line) -> str:
    way, head = _path(line.points), _head(line.points)
    return f'<path class="{line.look}" d="{way}"/><path class="{line.look} head" d="{head}"/>'


def _path(points: Sequence[Point]) -> str:
    """The way along the corners, rounded, up to the arrow's head."""
    (x, y), *_ = points
    steps = [f"M{_number(x)} {_number(y)}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        a, b = _towards(corner, before), _towards(corner, after)
        steps.append(f"L{_pair(a)}Q{_pair(corner)} {_pair(b)}")
    end = _towards(points[-1], points[-2], _HEAD - 1)
    return "".join([*steps, f"L{_pair(end)}"])


def _head(points: Sequence[Point]) -> str:
    """The arrow's head at the last point."""
    tip, base = points[-1], _towards(points[-1], points[-2], _HEAD)
    dx, dy = (tip[0] - base[0]) * 0.5, (tip[1] - base[1]) * 0.5
    return f"M{_pair(tip)}L{_pair((base[0] - dy, base[1] + dx))}L{_pair((base[0] + dy, base[1] - dx))}Z"


def _towards(start: Point, goal: Point, distance: float = _CORNER) -> Point:
    """The point `distance` from `start` on the way to `goal`, at most half of it."""
    dx, dy = goal[0] - start[0], goal[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    if length == 0:
        return start
    part = min(distance / length, 0.5)
    return start[0] + dx * part, start[1] + dy * part


def _pair(point: Point) -> str:
    return f"{_number(point[0])} {_number(point[1])}"


def _number(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
