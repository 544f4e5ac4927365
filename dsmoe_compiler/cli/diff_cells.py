"""Tables that fit a page: cells that are too long lose their middle, no name does anything to a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dsmoe_compiler.report.grid import Column, Grid, Row

_LEAST = 16  # characters of a cell that is cut: fewer say nothing


def fitted(columns: Sequence[Column], rows: Iterable[Row], wide: int, width: int) -> Grid:
    """A table in which the longest cells are cut in their middle until it fits, those of column `wide`
    first.
    """
    cut = [replace(row, cells=tuple(map(printable, row.cells))) for row in rows]
    for place in (wide, *(i for i in reversed(range(len(columns))) if i != wide)):
        over = Grid(tuple(columns), tuple(cut)).width - width
        if over > 0:
            most = max(_LEAST, max(len(row.cells[place]) for row in cut) - over)
            cut = [replace(row, cells=_with_cell_cut(row.cells, place, most)) for row in cut]
    return Grid(tuple(columns), tuple(cut))


def _with_cell_cut(cells: tuple[str, ...], place: int, most: int) -> tuple[str, ...]:
    return (*cells[:place], shortened(cells[place], most), *cells[place + 1 :])


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: the middle of a longer one is left out."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def printable(text: str) -> str:
    """A name as one line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
