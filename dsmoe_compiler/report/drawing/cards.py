"""One card of a sketch as shapes and labels."""

from __future__ import annotations

from dsmoe_compiler.report.drawing import measure
from dsmoe_compiler.report.drawing.layout import Box
from dsmoe_compiler.report.drawing.measure import BAR, LINE, PAD_X, PAD_Y, SMALL, TITLE
from dsmoe_compiler.report.drawing.scene import Group, Label, Shape
from dsmoe_compiler.report.drawing.sketch import LOST, Card, Section

_STACK = 3.0  # how far the cards behind a stack look out


def card_group(card: Card, box: Box) -> Group:
    """The card in its box."""
    look = "lost" if card.lost else card.role if card.role and card.kind != "fused" else card.kind
    group = Group(card.tip)
    for behind in (2, 1) if card.copies > 1 else ():
        group.shapes.append(Shape(box.moved(behind * _STACK, behind * _STACK), f"card {look}", 6))
    group.shapes.append(Shape(box, f"card {look}", 6))
    if card.kind == "fused":
        _fused(card, box, group)
        return group
    if card.role:
        group.shapes.append(Shape(Box(box.x, box.y + 6, BAR, box.height - 12), f"bar {look}", 2))
    left, base = box.x + BAR + PAD_X, box.y + PAD_Y + TITLE - 2
    group.labels.append(Label(card.title, left, base, TITLE, "title"))
    for i, line in enumerate(card.lines):
        look_of_line = "parameter" if line[:1] in "@%" else "alarm-text" if line == LOST else "type"
        group.labels.append(Label(line, left, base + LINE * (i + 1), SMALL, look_of_line))
    if text := measure.badge(card):
        width = measure.badge_width(card)
        pill = Box(box.right - PAD_X - width + 4, box.y + 7, width, 17)
        group.shapes.append(Shape(pill, f"pill {look}", 8.5))
        group.labels.append(Label(text, pill.x + measure.BADGE_PAD, pill.y + 12.4, SMALL, f"badge {look}"))
    return group


def _fused(card: Card, box: Box, group: Group) -> None:
    left, y = box.x + BAR + PAD_X, box.y + PAD_Y + TITLE
    group.labels.append(Label(card.title, left, y, TITLE, "title"))
    y += 18
    for section in card.sections:
        _section(section, Box(left, y, box.right - PAD_X - left, measure.section_height(section)), group)
        y += measure.section_height(section) + measure.SECTION_GAP


def _section(section: Section, box: Box, group: Group) -> None:
    group.shapes.append(Shape(Box(box.x, box.y, BAR, box.height), f"bar {section.role}", 2))
    left, y = box.x + BAR + 8, box.y + 10
    group.labels.append(Label(section.heading, left, y, SMALL + 1, f"heading {section.role}", fixed=False))
    for line in section.lines:
        y += LINE
        look = "type" if line[:1] == "p" and line[1:2].isdigit() else "said"
        group.labels.append(Label(line, left, y, SMALL, look))
    if section.code:
        inset = Box(left, y + 8, box.right - left, len(section.code) * LINE + 10)
        group.shapes.append(Shape(inset, "code", 4))
        y += 6
        for line in section.code:
            y += LINE
            group.labels.append(Label(line, left + 8, y + 2, SMALL, "said"))
