"""A table of text: what is in its cells, and how wide they are. How it is coloured is the caller's affair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column's title, and whether its cells are numbers, set to the right."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Row:
    """One line of cells, and the lines that explain it, printed indented below it.

    `alert` marks a row that wants the reader's eye.
    """

    cells: tuple[str, ...]
    below: tuple[str, ...] = ()
    alert: bool = False


@dataclass(frozen=True)
class Grid:
    """Columns and rows; every row has a cell for each column. Raises ValueError otherwise."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, but a row of {len(row.cells)}: {row.cells}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each column, in characters."""
        return tuple(
            max(len(column.title), *(len(row.cells[i]) for row in self.rows), 0)
            for i, column in enumerate(self.columns)
        )

    @property
    def width(self) -> int:
        """The width of the whole table; lines below a row not counted."""
        return sum(self.widths) + len(GAP) * (len(self.columns) - 1)

    @property
    def titles(self) -> tuple[str, ...]:
        """The titles, padded to their columns."""
        return self._padded(tuple(column.title for column in self.columns))

    def padded(self, row: Row) -> tuple[str, ...]:
        """The row's cells, padded to their columns."""
        return self._padded(row.cells)

    def lines(self) -> Iterator[str]:
        """The table as plain lines, titles first."""
        yield GAP.join(self.titles).rstrip()
        for row in self.rows:
            yield GAP.join(self.padded(row)).rstrip()
            yield from row.below

    def _padded(self, cells: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(cells, self.widths, self.columns, strict=True)
        )
