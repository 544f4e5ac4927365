"""A drawing as plain data: shapes, lines and labels with where they lie, and the names of their looks."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsmoe_compiler.report.drawing.layout import Box, Point
from dsmoe_compiler.report.drawing.measure import mono, sans


@dataclass(frozen=True)
class Shape:
    """A rectangle; `look` names its style."""

    box: Box
    look: str
    radius: float = 0.0


@dataclass(frozen=True)
class Line:
    """An arrow along corners; `look` names its style."""

    points: tuple[Point, ...]
    look: str


@dataclass(frozen=True)
class Label:
    """A line of text: where its baseline begins, its size, its style, and whether its letters are equally
    wide.
    """

    text: str
    x: float
    y: float
    size: float
    look: str
    fixed: bool = True

    @property
    def box(self) -> Box:
        """What the text covers at most."""
        width = mono(self.text, self.size) if self.fixed else sans(self.text, self.size)
        return Box(self.x, self.y - 0.8 * self.size, width, self.size)


@dataclass
class Group:
    """What belongs together, and the text shown when one points at it."""

    tip: str = ""
    shapes: list[Shape] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


@dataclass
class Scene:
    """Groups from back to front, for a reader called `title`."""

    title: str
    width: float
    height: float
    groups: list[Group] = field(default_factory=list)

    @property
    def labels(self) -> list[Label]:
        """All text."""
        return [label for group in self.groups for label in group.labels]
