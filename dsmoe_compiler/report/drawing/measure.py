"""How large text and cards are, in pixels, before anything has drawn them."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_compiler.report.drawing.sketch import Card, Section

MONO = 0.605  # the widest advance of the monospaced fonts asked for, in ems
SANS = 0.7  # the mean advance of a bold sans-serif, in ems: the widest in use
TITLE, SMALL, HEADING = 13.0, 11.0, 12.0
LINE, SECTION_GAP = 16.0, 12.0
PAD_X, PAD_Y, BAR = 12.0, 9.0, 4.0
BADGE_PAD = 7.0


@dataclass(frozen=True)
class Size:
    """Width and height."""

    width: float
    height: float


def mono(text: str, size: float) -> float:
    """The width of text in the monospaced font."""
    return len(text) * size * MONO


def sans(text: str, size: float) -> float:
    """About the width of text in the other font; never less than it has."""
    return len(text) * size * SANS


def badge(card: Card) -> str:
    """What says how many copies a card stands for; "" for one."""
    return f"×{card.copies}" if card.copies > 1 else ""


def badge_width(card: Card) -> float:
    """The width of the badge with its padding; 0 where there is none."""
    return mono(badge(card), SMALL) + 2 * BADGE_PAD if badge(card) else 0.0


def size_of(card: Card) -> Size:
    """The size of a card's box."""
    if card.kind == "fused":
        return _fused(card)
    title = mono(card.title, TITLE) + (badge_width(card) + 10 if badge(card) else 0)
    width = max(title, *(mono(line, SMALL) for line in card.lines))
    return Size(_even(BAR + 2 * PAD_X + width), _even(2 * PAD_Y + LINE * (1 + len(card.lines)) - 2))


def section_height(section: Section) -> float:
    """The height of one part of a fused op."""
    code = len(section.code) * LINE + (2 * 6 + 6 if section.code else 0)
    return LINE * (1 + len(section.lines)) + code


def _fused(card: Card) -> Size:
    lines = [line for s in card.sections for line in (*s.lines, *(f"  {c}" for c in s.code))]
    width = max(*(mono(line, SMALL) for line in lines), mono(card.title, TITLE)) + 10
    height = sum(section_height(s) + SECTION_GAP for s in card.sections)
    return Size(_even(BAR + 2 * PAD_X + width), _even(2 * PAD_Y + LINE + 14 + height))


def _even(number: float) -> float:
    return float(2 * round((number + 1) / 2))
