"""A layer as one draws it: a card for each operator worth a look, arrows between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsmoe_compiler.report.drawing.layer_graph import Role

LOST = "understanding ended here"


@dataclass(frozen=True)
class Section:
    """One part of a fused op: the role it took over, a heading, plain lines, lines of code."""

    role: Role
    heading: str
    lines: tuple[str, ...]
    code: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """A box of the drawing: its title and what is written below it.

    `members` are the values of the layer that it stands for, `copies` how many alike it stands for, `tip` the
    lines of text behind it.
    """

    key: str
    kind: Literal["given", "operator", "fused", "result"]
    role: Role | None
    title: str
    lines: tuple[str, ...]
    members: tuple[str, ...] = ()
    copies: int = 1
    lost: bool = False
    sections: tuple[Section, ...] = ()
    tip: str = ""


@dataclass(frozen=True)
class Sketch:
    """Cards in execution order, and which reads which."""

    cards: tuple[Card, ...]
    arrows: tuple[tuple[str, str], ...]

    @property
    def shown(self) -> int:
        """How many operators have a card, copies counted once."""
        return sum(card.kind in ("operator", "fused") for card in self.cards)
