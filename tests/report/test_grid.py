"""Plain tables: padding, numbers to the right, lines below a row."""

import pytest

from dsmoe_compiler.report.grid import Column, Grid, Row


def test_cells_are_padded_to_their_column() -> None:
    grid = Grid(
        (Column("name"), Column("ms", number=True)),
        (Row(("a", "1")), Row(("longer", "100"), below=("  why",))),
    )
    assert list(grid.lines()) == ["name     ms", "a         1", "longer  100", "  why"]
    assert grid.width == 11


def test_a_grid_without_rows_is_its_titles() -> None:
    assert list(Grid((Column("a"), Column("b")), ()).lines()) == ["a  b"]


def test_a_row_has_a_cell_a_column() -> None:
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Grid((Column("a"), Column("b")), (Row(("x",)),))
